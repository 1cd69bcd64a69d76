"""What versions of PEFT wrote, as `record_peft.py` recorded it, computes what it did there."""

import base64
import copy
import itertools
import json
from pathlib import Path

import pytest
import torch

import oftfx
from tests.interop.record_peft import FILES, IDS, Tiny

RECORDED = {
    path.stem: json.loads(path.read_text())
    for path in Path(__file__).parent.glob("recorded/*.json")
}
CASES = [(version, case) for version in sorted(RECORDED) for case in RECORDED[version]]


@pytest.fixture
def recorded(request, tmp_path):
    version, case = request.param
    held = RECORDED[version][case]
    for name in FILES:
        (tmp_path / name).write_bytes(base64.b64decode(held["files"][name]))
    return version, case, tmp_path, torch.tensor(held["logits"])


def test_every_minor_version_is_recorded():
    assert [version.rsplit(".", 1)[0] for version in sorted(RECORDED)] == [
        "0.16",
        "0.17",
        "0.18",
        "0.19",
        "0.20",
    ]


@pytest.mark.filterwarnings("ignore:.*singular vectors")
@pytest.mark.filterwarnings("ignore:.*holds no bias")
@pytest.mark.parametrize("recorded", CASES, indirect=True, ids=": ".join)
def test_it_computes_what_it_did_there_and_is_written_again(recorded):
    version, case, path, expected = recorded
    ours = oftfx.load(Tiny(), path)
    assert least_error(ours, expected) <= 1e-5
    if version < "0.18" and case.startswith(("oft", "coft")) and "exact" not in case:
        with pytest.raises(oftfx.CheckpointError, match="which no later one has"):
            oftfx.save(ours, path / "again", format="peft")
        return
    oftfx.save(ours, path / "again", format="peft")
    if case != "coft":  # PEFT projects when it computes, and so does reading
        assert (path / "again" / FILES[1]).read_bytes() == (path / FILES[1]).read_bytes()


def least_error(model: torch.nn.Module, expected: torch.Tensor) -> float:
    """Relative, over the signs of singular vectors, which each machine chooses."""
    model = copy.deepcopy(model)
    rows = [row for name, t in model.named_parameters() if name.endswith(".support") for row in t]
    errors = []
    with torch.no_grad():
        held = [row.clone() for row in rows]
        for signs in itertools.product((1, -1), repeat=len(rows)):
            for row, sign, value in zip(rows, signs, held, strict=True):
                row.copy_(sign * value)
            errors.append(float((model(IDS) - expected).norm() / expected.norm()))
    return min(errors)


@pytest.mark.parametrize("recorded", [("0.18.1", "oft, biases")], indirect=True)
def test_biases_that_were_trained_and_not_saved_are_told(recorded):
    with pytest.warns(oftfx.OftfxWarning, match="holds no bias"):
        oftfx.load(Tiny(), recorded[2])


@pytest.mark.parametrize("recorded", [("0.17.1", "oft")], indirect=True)
def test_the_polynomial_is_the_versions(recorded):
    """The same file under another version is another function."""
    _, _, path, expected = recorded
    config = json.loads((path / FILES[0]).read_text())
    assert "peft_version" not in config  # none before 0.18 says
    (path / FILES[0]).write_text(json.dumps({**config, "peft_version": "0.18.0"}))
    with torch.no_grad():
        error = (oftfx.load(Tiny(), path)(IDS) - expected).norm() / expected.norm()
    assert error > 1e-4
