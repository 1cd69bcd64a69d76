"""What `make demo` runs, with METHOD= and ARGS= too: the demo of each method."""

import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import oftfx.train
from oftfx import cli
from oftfx.spec import METHODS

ROOT = Path(__file__).parents[1]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def job_of(monkeypatch, *variables: str) -> oftfx.train.Job:
    """What `make demo` with these variables would run."""
    make = ["make", "--dry-run", "--silent", "demo", *variables]
    planned = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    _, _, options = planned.splitlines()[-1].partition("examples/demo.py")
    found = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(found)
    found.loader.exec_module(demo)
    jobs = []

    def run(job, console):
        jobs.append(job)
        raise SystemExit

    monkeypatch.setattr(oftfx.train, "run", run)
    arguments = demo.command(Path("model.gguf"), shlex.split(options))
    monkeypatch.setattr(sys, "argv", ["oftfx", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    (job,) = jobs
    return job


@needs_make
@pytest.mark.parametrize("method", [name.lower() for name in METHODS])
def test_each_method_has_a_demo_of_its_own(method, monkeypatch):
    job = job_of(monkeypatch, f"METHOD={method}")
    assert type(job.spec) is METHODS[method.upper()]
    assert job.out == Path("out", f"demo-{method}")
    assert job.steps == oftfx.train.Job.steps


@needs_make
def test_without_a_method_it_is_oft(monkeypatch):
    job = job_of(monkeypatch)
    assert job.spec == oftfx.OFT()
    assert job.out == Path("out/demo")


@needs_make
def test_the_learning_rate_is_an_angle_where_it_is_asked_to_be(monkeypatch):
    plain, unit = job_of(monkeypatch), job_of(monkeypatch, "ARGS=--unit-rate")
    rate = 2 * (unit.spec.block_size - 1)
    assert unit.lr == pytest.approx(plain.lr * rate, rel=0.1)


@needs_make
def test_more_options_are_added(monkeypatch):
    job = job_of(monkeypatch, "METHOD=hra", "ARGS=--steps 7 --rank 4 --out 'out/my demo'")
    assert (job.steps, job.spec, job.out) == (7, oftfx.HRA(rank=4), Path("out/my demo"))
