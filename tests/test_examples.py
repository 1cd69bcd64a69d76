"""Each example runs as it says, and its own assertions hold."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from huggingface_hub import constants

EXAMPLES = Path(__file__).parents[1] / "examples"
HERE = ["finetune_and_merge", "qoft", "trainer", "accelerate_loop", "trl_sft", "trl_dpo"]
TRAIN_TOGETHER = ["trainer", "accelerate_loop"]


@pytest.fixture
def _as_a_program(tmp_path, monkeypatch):
    """In an empty directory, offline, and with accelerate's process-wide state as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# In this process: importing torch and its company again takes longer than they do.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "qoft")) for n in HERE]
)
@pytest.mark.usefixtures("_as_a_program")
def test_it_runs(name, tmp_path, monkeypatch):
    directory = [str(tmp_path)] if name in TRAIN_TOGETHER else []
    monkeypatch.setattr(sys, "argv", [name, *directory])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAIN_TOGETHER)
def test_it_runs_in_two_processes(name, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    hidden = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launch, EXAMPLES / f"{name}.py", tmp_path],
        cwd=tmp_path,
        env=os.environ | hidden,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_example_is_run():
    elsewhere = {"tiny", "demo"}  # imported by the others; run by tests/train/test_demo.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*HERE} | elsewhere
