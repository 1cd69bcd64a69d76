"""What `make dist` builds is whole, and installs where nothing is."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PINS = ROOT / "constraints" / "ci.txt"

CORE = """
import torch, oftfx
model, x = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.randn(2, 8)
oftfx.adapt(model, oftfx.OFT(block_size=4, init_std=0.1), example_inputs=x)
oftfx.save(model, "adapter")
expected = model(x)
torch.testing.assert_close(oftfx.merge(model)(x), expected)
"""

pytestmark = pytest.mark.slow


def run(*command, check=True, **options):
    # Without the variables that would let a bare environment see this one.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    clean["DISABLE_CUDA"] = "1"  # hqq, of the dev extra, would build kernels
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, env=clean, **options
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_metadata_is_accepted(built):
    run(sys.executable, "-m", "twine", "check", "--strict", *built)


def test_every_file_of_the_package_is_in_both(built):
    sdist, wheel = built
    package = (path for path in (ROOT / "oftfx").rglob("*") if path.is_file())
    names = {str(path.relative_to(ROOT)) for path in package if "__pycache__" not in path.parts}
    assert "oftfx/py.typed" in names
    with zipfile.ZipFile(wheel) as archive:
        assert names == {name for name in archive.namelist() if name.startswith("oftfx/")}
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert names | {"LICENSE", "README.md", "CHANGELOG.md"} <= held


TOOLS = {"": None, "[train]": "oftfx", "[dev]": "oftfx", "[docs]": "mkdocs", "[release]": "twine"}
"""What an extra brings to run."""


@pytest.mark.parametrize("extra", TOOLS)
def test_it_installs_in_a_bare_environment(built, extra, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / "bin"
    # torch first and pinned, as the Makefile does it.
    (torch,) = (line for line in PINS.read_text().splitlines() if line.startswith("torch=="))
    for wanted in (torch, f"{built[1]}{extra}"):
        run(scripts / "python", "-m", "pip", "install", "-q", "-c", PINS, wanted)
    run(scripts / "python", "-c", CORE, cwd=tmp_path)
    if TOOLS[extra]:
        run(scripts / TOOLS[extra], "--help", cwd=tmp_path)
    said = run(scripts / "oftfx", "--help", cwd=tmp_path, check=False)
    if TOOLS[extra] == "oftfx":
        assert said.returncode == 0
        assert "finetune" in said.stdout
    else:
        assert said.returncode == 1
        assert "pip install 'oftfx[train]'" in said.stderr
        assert "Traceback" not in said.stderr
