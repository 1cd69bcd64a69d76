"""The promise of `make demo`, on the real SmolLM2-135M."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oftfx.train.output import MARKER
from oftfx.train.publish import TOLERANCE

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_real_model_learns_and_folds(tmp_path):
    command = [sys.executable, "examples/demo.py", "--out", str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, check=True)
    report = json.loads((tmp_path / "out" / MARKER).read_text())
    learned, forgot = report["task"]["change"], report["unrelated"]["change"]
    assert learned["mean"] + 5 * learned["stderr"] < -0.2
    assert forgot["mean"] < 0.1
    assert report["trainable"] == 2_321_280
    assert max(site["orthogonality_error"] for site in report["sites"]) < 1e-4
    assert report["reload"]["max_difference"] < 1e-4 * report["reload"]["scale"]
    assert report["reload"]["same_top"] > 0.98


@pytest.mark.slow
def test_it_learns_and_folds_on_a_base_in_four_bits(tmp_path):
    command = [sys.executable, "examples/demo.py", "--quant", "nf4", "--out", str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, check=True)
    report = json.loads((tmp_path / "out" / MARKER).read_text())
    learned, forgot = report["task"]["change"], report["unrelated"]["change"]
    assert learned["mean"] + 5 * learned["stderr"] < -0.2
    assert forgot["mean"] < 0.1
    assert report["trainable"] == 2_321_280
    assert (
        report["reload"]["max_difference"] < TOLERANCE[torch.bfloat16] * report["reload"]["scale"]
    )
    assert report["reload"]["same_top"] > 0.9
