"""Adapters on disk: the same numbers again, or an error that says what is wrong."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

import oftfx
from oftfx import OFT, CheckpointError, PlanError
from oftfx.checkpoint import MANIFEST, TENSORS
from tests.small import rows, small

SPEC = OFT(
    block_size=4,
    order=3,
    overrides={"out": {"block_size": 8}, "w": {"block_size": 2}},
    targets=["q", "w", "out"],
)
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        torch.manual_seed(7)
        self.q = nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, width))
        self.out = nn.Linear(width, 4)

    def forward(self, x):
        return self.out(torch.relu(self.q(x)) @ self.w)


KINDS = ("module", "symbolic", "exported")


def base(kind: str = "module", model: nn.Module | None = None):
    model = Net() if model is None else model
    if kind == "symbolic":
        return fx.symbolic_trace(model)
    return torch.export.export(model, (X,)) if kind == "exported" else model


def call(model, x=X):
    with torch.no_grad():
        return model.module()(x) if isinstance(model, torch.export.ExportedProgram) else model(x)


@pytest.fixture(scope="session")
def plan() -> oftfx.Plan:
    return oftfx.plan(Net(), SPEC, X)


def trained(kind: str, plan: oftfx.Plan, name: str = "default"):
    """An adapted model whose rotations have turned, the same way whatever its kind."""
    model = oftfx.adapt(base(kind), plan, name)
    generator = torch.Generator().manual_seed(3)
    # By size: the kinds list their parameters in orders of their own, and no two are alike here.
    for theta in sorted(oftfx.parameters(model), key=torch.numel):
        with torch.no_grad():
            theta.copy_(0.2 * torch.randn(theta.shape, generator=generator))
    return model


@pytest.fixture
def saved(tmp_path, plan) -> Path:
    oftfx.save(trained("module", plan), tmp_path / "adapter")
    return tmp_path / "adapter"


def refuses(path: Path, told: str, model: nn.Module | None = None) -> str:
    """Loading fails with this and leaves the model exactly as it was."""
    model = Net() if model is None else model
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    with pytest.raises(CheckpointError, match=told) as caught:
        oftfx.load(model, path)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    with pytest.raises(PlanError):
        oftfx.parameters(model)
    return str(caught.value)


# --- round trips ---


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("origin", KINDS)
def test_round_trip_over_every_pair_of_kinds(tmp_path, plan, origin, to):
    model = trained(origin, plan)
    oftfx.save(model, tmp_path / "adapter")
    loaded = oftfx.load(base(to), tmp_path / "adapter")
    assert not torch.equal(call(model), call(base()))
    torch.testing.assert_close(call(loaded), call(model), rtol=0, atol=1e-6)
    ours = {tuple(theta.shape): theta for theta in oftfx.parameters(model)}
    theirs = {tuple(theta.shape): theta for theta in oftfx.parameters(loaded)}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[shape], theirs[shape]) for shape in ours)  # bit for bit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_other_dtypes_round_trip(tmp_path, plan, dtype):
    spec = OFT(block_size=4, dtype=dtype, init_std=0.1, targets="q")
    model = oftfx.adapt(Net(), spec, capture="modules")
    oftfx.save(model, tmp_path)
    (ours,), (theirs,) = oftfx.parameters(model), oftfx.parameters(oftfx.load(Net(), tmp_path))
    assert theirs.dtype == dtype
    assert torch.equal(ours, theirs)


def test_shared_rotations_are_stored_once(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) + self.b(x)

    torch.manual_seed(0)
    model = Pair()
    fresh = Pair()
    fresh.load_state_dict(model.state_dict())
    spec = OFT(block_size=4, share_inputs=True, init_std=0.2)
    oftfx.save(oftfx.adapt(model, spec, example_inputs=X), tmp_path)
    assert list(load_file(tmp_path / TENSORS)) == ["a.theta"]
    assert torch.equal(call(oftfx.load(fresh, tmp_path)), call(model))
    assert len(oftfx.parameters(fresh)) == 1


def test_an_adapter_may_be_loaded_under_another_name(tmp_path, plan):
    model = trained("module", plan, "first")
    oftfx.save(model, tmp_path, name="first")
    loaded = oftfx.load(Net(), tmp_path, name="second")
    assert torch.equal(call(loaded), call(model))
    assert len(oftfx.parameters(loaded, "second")) == 3
    with pytest.raises(PlanError, match="already"):
        oftfx.load(loaded, tmp_path, name="second")
    assert torch.equal(call(loaded), call(model))


def test_saving_what_is_not_there(tmp_path, plan):
    for model in (Net(), trained("module", plan, "other"), base("symbolic"), base("exported")):
        with pytest.raises(PlanError, match="no adapter"):
            oftfx.save(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()


def test_compiled_models_are_saved_as_what_they_wrap(tmp_path, plan):
    model = trained("module", plan)
    oftfx.save(torch.compile(model), tmp_path)
    assert torch.equal(call(oftfx.load(Net(), tmp_path)), call(model))


def test_files_hold_tensors_and_json_and_no_pickle(saved):
    assert {file.name for file in saved.iterdir()} == {TENSORS, MANIFEST}
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["oftfx"] == oftfx.__version__
    assert oftfx.Plan.from_json(json.dumps(manifest["plan"])).spec == SPEC
    assert sorted(load_file(saved / TENSORS)) == ["out.theta", "q.theta", "w.theta"]
    for file in saved.iterdir():
        head = file.read_bytes()[:2]
        assert head not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"), file


def test_neither_saving_nor_loading_pickles(tmp_path, plan, monkeypatch):
    import pickle

    model, fresh = trained("module", plan), Net()

    def refuse(*args, **kwargs):
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    oftfx.save(model, tmp_path)
    oftfx.load(fresh, tmp_path)


# --- the base ---


def test_a_cast_base_is_accepted(saved, plan):
    model = oftfx.load(Net().to(torch.bfloat16), saved)
    reference = trained("module", plan)
    x = X.to(torch.bfloat16)
    difference = (call(model, x).float() - call(reference)).norm() / call(reference).norm()
    assert difference < 0.05  # a handful of bf16 roundings


def test_a_base_with_other_values_is_refused(saved):
    model = Net()
    with torch.no_grad():
        model.out.weight.add_(0.05 * torch.randn_like(model.out.weight))
    assert "another base" in refuses(saved, r"values of out\.weight differ", model)


def test_a_merged_base_is_refused(saved, plan):
    merged = oftfx.merge(trained("module", plan))
    refuses(saved, "another base", merged)


def test_a_base_with_other_shapes_is_refused(saved):
    refuses(saved, r"another base: w is \(8, 24\) here, 16×8 there", Net(width=24))


def test_a_base_without_the_layer_is_refused(saved):
    model = Net()
    model.other, model.out = model.out, nn.Identity()
    refuses(saved, r"no out\.weight", model)


def test_every_kind_of_base_is_checked(saved):
    other = Net()
    with torch.no_grad():
        other.q.weight.neg_()
    for kind in ("symbolic", "exported"):
        with pytest.raises(CheckpointError, match=r"q\.weight differ"):
            oftfx.load(base(kind, other), saved)


def test_a_base_merged_after_a_short_run_is_refused(saved, plan):
    short = trained("module", plan)
    with torch.no_grad():
        for theta in oftfx.parameters(short):
            theta.mul_(0.003 / theta.abs().mean())
    refuses(saved, "another base", oftfx.merge(short))


def test_a_base_that_is_half_of_16_bits_is_accepted(saved):
    oftfx.load(Net().half(), saved)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_base_with_a_number_that_is_not_finite_is_itself(tmp_path, odd):
    def net():
        model = Net()
        with torch.no_grad():
            model.out.weight[0, 0] = odd
        return model

    oftfx.save(oftfx.adapt(net(), SPEC, example_inputs=X), tmp_path)
    oftfx.load(net(), tmp_path)
    refuses(tmp_path, r"values of out\.weight differ")


def test_a_layer_without_outputs_is_saved_and_loaded(tmp_path):
    x = torch.randn(2, 8)
    model = oftfx.adapt(nn.Linear(8, 0), OFT(block_size=4), example_inputs=x)
    oftfx.save(model, tmp_path)
    oftfx.load(nn.Linear(8, 0), tmp_path)


def test_a_base_without_values_is_refused(saved):
    """A copy to meta copies nothing: the adapter would be gone without a word."""
    with torch.device("meta"):
        model = Net()
    with pytest.raises(CheckpointError, match=r"q\.theta would be on `meta`.*to_empty"):
        oftfx.load(model, saved)
    assert oftfx.adapters(model) == {}


# --- damaged and foreign files ---


def test_truncated_tensors(saved):
    payload = (saved / TENSORS).read_bytes()
    for length in (0, 4, 100, len(payload) - 1):
        (saved / TENSORS).write_bytes(payload[:length])
        refuses(saved, rf"{TENSORS} is truncated")


def test_one_flipped_bit_anywhere_in_the_tensors(saved):
    payload = bytearray((saved / TENSORS).read_bytes())
    for place in (len(payload) - 1, len(payload) - 100, 12, 60):
        flipped = payload.copy()
        flipped[place] ^= 1
        (saved / TENSORS).write_bytes(bytes(flipped))
        refuses(saved, TENSORS)


def test_a_foreign_tensor_file(saved):
    (saved / TENSORS).write_bytes(b"not a safetensors file, but long enough to be read as one")
    refuses(saved, TENSORS)


def test_a_missing_tensor_file(saved):
    (saved / TENSORS).unlink()
    refuses(saved, rf"{TENSORS} is missing")


def test_a_missing_tensor_is_named(saved):
    tensors = load_file(saved / TENSORS)
    del tensors["w.theta"]
    save_file(tensors, saved / TENSORS)
    refuses(saved, r"lacks the tensor 'w\.theta'")


def test_an_extra_tensor_is_named(saved):
    tensors = load_file(saved / TENSORS)
    save_file({**tensors, "k.theta": torch.zeros(2, 6)}, saved / TENSORS)
    refuses(saved, r"k\.theta")


def test_a_tensor_of_another_shape_is_named(saved):
    tensors = load_file(saved / TENSORS)
    save_file({**tensors, "q.theta": torch.zeros(4, 6)}, saved / TENSORS)
    refuses(saved, r"'q\.theta' has shape \(4, 6\)")


def test_tensors_of_another_adapter(saved):
    """Right names and shapes, but not the file the manifest was written for."""
    tensors = load_file(saved / TENSORS)
    save_file({key: value + 1 for key, value in tensors.items()}, saved / TENSORS)
    refuses(saved, "not the file")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"order": 3', '"order": 2'),
        ('"in_features": 8', '"in_features": 4'),
        (f'"oftfx": "{oftfx.__version__}"', '"oftfx": "9.9.9"'),
    ],
)
def test_an_edited_manifest(saved, old, new):
    text = (saved / MANIFEST).read_text()
    assert old in text
    (saved / MANIFEST).write_text(text.replace(old, new))
    refuses(saved, "changed or damaged")


@pytest.mark.parametrize("cut", [0, 1, 50, -2])
def test_a_truncated_manifest(saved, cut):
    text = (saved / MANIFEST).read_text()
    (saved / MANIFEST).write_text(text[:cut] if cut else "")
    refuses(saved, MANIFEST)


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", "3", '"a"', '{"checksum": "0"}', '{"format": 1}', "\x00\x01"]
)
def test_a_foreign_manifest(saved, text):
    (saved / MANIFEST).write_text(text)
    refuses(saved, MANIFEST)


def test_a_manifest_that_is_no_text(saved):
    (saved / MANIFEST).write_bytes(b"\xff\xfe\x00")
    refuses(saved, MANIFEST)


def test_a_newer_format_names_the_version_that_wrote_it(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    manifest |= {"format": 99, "oftfx": "7.0.0"}
    (saved / MANIFEST).write_text(json.dumps(manifest))
    refuses(saved, r"format 99.*oftfx 7\.0\.0")


def test_a_missing_and_an_empty_directory(tmp_path):
    refuses(tmp_path / "nowhere", "no directory")
    refuses(tmp_path, MANIFEST)
    (tmp_path / "file").write_text("")
    refuses(tmp_path / "file", "no directory")


# --- atomic ---


def more_trained(plan):
    model = trained("module", plan)
    with torch.no_grad():
        for theta in oftfx.parameters(model):
            theta.add_(0.05)
    return model


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failure_while_replacing_never_leaves_a_torn_pair_unnoticed(
    saved, plan, monkeypatch, fails_at
):
    """Before the first rename the old adapter is whole; between the two, loading must notice."""
    old = call(oftfx.load(Net(), saved))
    replace, calls = os.replace, []

    def failing(*args):
        calls.append(args)
        if len(calls) == fails_at:
            raise OSError("disk full")
        replace(*args)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(CheckpointError, match="disk full"):
        oftfx.save(more_trained(plan), saved)
    monkeypatch.undo()
    assert {file.name for file in saved.iterdir()} == {
        TENSORS,
        MANIFEST,
    }  # nothing temporary is left
    assert torch.equal(call(oftfx.load(Net(), saved)), old)


def test_a_failure_while_writing_leaves_the_old_adapter(saved, plan, monkeypatch):
    old = call(oftfx.load(Net(), saved))

    def failing(self, payload):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", failing)
    with pytest.raises(CheckpointError, match="disk full"):
        oftfx.save(more_trained(plan), saved)
    monkeypatch.undo()
    assert torch.equal(call(oftfx.load(Net(), saved)), old)


def test_saving_replaces_an_adapter(saved, plan):
    model = more_trained(plan)
    oftfx.save(model, saved)
    assert torch.equal(call(oftfx.load(Net(), saved)), call(model))


def test_a_directory_that_cannot_be_made(tmp_path, plan):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        oftfx.save(trained("module", plan), tmp_path / "file" / "adapter")


def test_an_adapter_can_be_moved(saved, tmp_path, plan):
    shutil.move(saved, tmp_path / "elsewhere")
    loaded = oftfx.load(Net(), str(tmp_path / "elsewhere"))
    assert torch.equal(call(loaded), call(trained("module", plan)))


def test_an_adapter_in_another_format_takes_the_place_of_the_one_before(tmp_path):
    x = rows(torch.float32)
    made = [
        oftfx.adapt(small("mlp", torch.float32), OFT(block_size=4, init_std=std), example_inputs=x)
        for std in (0.1, 0.3)
    ]
    oftfx.save(made[0], tmp_path)
    oftfx.save(made[1], tmp_path, format="peft")
    loaded = oftfx.load(small("mlp", torch.float32), tmp_path)
    assert torch.equal(loaded(x), made[1](x))


@pytest.mark.parametrize("formats", [("oftfx", "peft"), ("peft", "oftfx")])
def test_the_files_of_one_format_replace_those_of_another(formats, tmp_path):
    model = oftfx.adapt(small("mlp"), OFT(block_size=4), example_inputs=rows())
    for format in formats:
        oftfx.save(model, tmp_path, format=format)
        assert len(list(tmp_path.iterdir())) == 2


def test_a_directory_of_two_adapters_is_refused(tmp_path):
    model = oftfx.adapt(small("mlp"), OFT(block_size=4), example_inputs=rows())
    oftfx.save(model, tmp_path)
    oftfx.save(model, tmp_path / "peft", format="peft")
    for file in (tmp_path / "peft").iterdir():
        shutil.copy(file, tmp_path)
    refuses(tmp_path, r"two adapters.*adapter\.json.*adapter_config\.json.*delete", small("mlp"))


def test_what_could_not_be_written_leaves_nothing_where_nothing_was(tmp_path):
    model = oftfx.adapt(small("mlp", torch.float32), OFT(block_size=4), capture="modules")
    (tmp_path / "adapter.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        oftfx.save(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.json"]
