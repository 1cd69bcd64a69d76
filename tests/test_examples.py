"""Each example runs as it says, and its own assertions hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HERE = ["finetune_and_merge", "qoft", "accelerate_loop", "trl_sft", "trl_dpo"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in HERE])
def test_it_runs(name, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_example_is_run():
    elsewhere = {"tiny", "demo"}  # imported by the others; run by tests/train/test_demo.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*HERE} | elsewhere
