"""What PEFT wrote computes here what it computes there, and the other way round."""

import copy
import json
import warnings

import pytest
import torch
from peft import HRAConfig, OFTConfig, PeftModel, PsoftConfig, get_peft_model
from safetensors.torch import load_file, save_file

import oftfx
from oftfx import CheckpointError
from tests.small import llama, tokens

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "oft": lambda: OFTConfig(oft_block_size=8, r=0, target_modules=TARGETS),
    "oft, by number of blocks": lambda: OFTConfig(oft_block_size=0, r=4, target_modules=TARGETS),
    "oft, adjusted": lambda: OFTConfig(oft_block_size=10, r=0, target_modules=TARGETS),
    "oft, 3 terms": lambda: OFTConfig(
        oft_block_size=8, r=0, target_modules=TARGETS, num_cayley_neumann_terms=3
    ),
    "oft, 7 terms": lambda: OFTConfig(
        oft_block_size=8, r=0, target_modules=TARGETS, num_cayley_neumann_terms=7
    ),
    "oft, exact": lambda: OFTConfig(
        oft_block_size=8, r=0, target_modules=TARGETS, use_cayley_neumann=False
    ),
    "oft, shared": lambda: OFTConfig(
        oft_block_size=8, r=0, target_modules=TARGETS, block_share=True
    ),
    "coft": lambda: OFTConfig(oft_block_size=8, r=0, target_modules=TARGETS, coft=True, eps=0.1),
    "hra": lambda: HRAConfig(r=4, target_modules=TARGETS),
    "psoft": lambda: PsoftConfig(r=4, target_modules=TARGETS),
    "psoft, strict": lambda: PsoftConfig(
        r=4, target_modules=TARGETS, psoft_mag_a=False, psoft_mag_b=False
    ),
}


def trained(config):
    """A base, and PEFT's model of it with rotations away from the identity."""
    base = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(base), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                start = parameter if "hra" in name or "vector" in name else 0
                parameter.copy_(start + 0.05 * torch.randn_like(parameter))
    return base, theirs


@torch.no_grad()
def agree(ours, theirs):
    """Both round in float32, in another order."""
    one, other = ours(**tokens()).logits, theirs(**tokens()).logits
    assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.fixture(params=CONFIGS)
def written(request, tmp_path):
    base, theirs = trained(CONFIGS[request.param]())
    theirs.save_pretrained(tmp_path / "peft")
    return base, theirs, tmp_path / "peft"


@pytest.mark.filterwarnings("ignore:.*singular vectors")
def test_reads_the_same_function(written):
    base, theirs, path = written
    ours = oftfx.load(base, path).eval()
    agree(ours, theirs)


# PEFT projects COFT's parameters only when it computes, and stores no singular vectors of PSOFT.
@pytest.mark.parametrize(
    "written", [name for name in CONFIGS if name.startswith(("oft", "hra"))], indirect=True
)
def test_read_then_written_is_the_same_file(written, tmp_path):
    base, _, path = written
    oftfx.save(oftfx.load(base, path), tmp_path / "again", format="peft")
    assert (tmp_path / "again" / FILE).read_bytes() == (path / FILE).read_bytes()


@pytest.mark.parametrize(
    "spec",
    [
        oftfx.OFT(block_size=8, order=4),
        oftfx.OFT(block_size=8, order=2, share_inputs=True),
        oftfx.OFT(block_size=8, exact=True),
        oftfx.OFT(block_size=8, share_blocks=True),
        oftfx.COFT(block_size=8, eps=0.1),
        oftfx.HRA(rank=4, init_std=0.1),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_peft_loads_what_is_written(spec, tmp_path):
    base = llama()
    ours = oftfx.adapt(copy.deepcopy(base), spec).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in oftfx.parameters(ours):
            parameter.add_(0.05 * torch.randn_like(parameter))
    oftfx.project(ours)
    oftfx.save(ours, tmp_path, format="peft")
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    agree(ours, theirs)


def test_the_block_size_that_peft_would_take():
    from peft.tuners.oft.layer import OFTLayer

    from oftfx.interop.peft.oft import adjusted

    for width in range(2, 97):
        for requested in range(1, width + 3):
            fits = requested <= width and width % requested == 0
            theirs = requested if fits else OFTLayer.adjust_oft_parameters(None, width, requested)
            assert adjusted(width, requested) == theirs, (width, requested)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (oftfx.OFT(block_size=8, order=1), "order=1"),
        (oftfx.OFT(block_size=8, guard="rescale"), "guard"),
        (oftfx.OFT(block_size=8, overrides={"q_proj": {"block_size": 4}}), "block sizes"),
        (oftfx.HRA(rank=4, overrides={"q_proj": {"rank": 2}}), "ranks"),
        (oftfx.GOFT(), "GOFT"),
        (oftfx.PSOFT(rank=4), "singular vectors"),
    ],
)
def test_what_peft_cannot_express_is_refused(spec, why, tmp_path):
    model = oftfx.adapt(llama(), spec)
    with pytest.raises(CheckpointError, match=why):
        oftfx.save(model, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'oftfx', 'peft' or 'lora'"):
        oftfx.save(oftfx.adapt(llama(), oftfx.OFT(block_size=8)), tmp_path, format="lore")


def edited(**changes):
    def edit(path):
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(config | changes))

    return edit


def changed(change):
    def edit(path):
        tensors = load_file(path / FILE)
        change(tensors)
        save_file(tensors, path / FILE, metadata={"format": "pt"})

    return edit


def rename(tensors, old, new):
    key = next(key for key in tensors if old in key)
    tensors[key.replace(old, new)] = tensors.pop(key)


def as_pickle(path):
    torch.save(load_file(path / FILE), path / "adapter_model.bin")
    (path / FILE).unlink()


def cut(path):
    (path / FILE).write_bytes((path / FILE).read_bytes()[:-7])


DAMAGE = {
    "another method": (edited(peft_type="LORA"), "LORA"),
    "no method": (lambda path: (path / CONFIG).write_text("{}"), "peft_type"),
    "no JSON": (lambda path: (path / CONFIG).write_text("{"), "damaged"),
    "a text for a number": (edited(num_cayley_neumann_terms="5"), "num_cayley_neumann_terms"),
    "too few terms": (edited(num_cayley_neumann_terms=2), "terms=2"),
    "an old version": (edited(peft_version=None), "0.18"),
    "no version": (edited(peft_version="new"), "peft_version"),
    "a pickle": (as_pickle, "pickle"),
    "no tensors": (lambda path: (path / FILE).unlink(), "missing"),
    "cut": (cut, "truncated"),
    "a foreign tensor": (changed(lambda t: rename(t, "oft_R.weight", "lora_A.weight")), "lora_A"),
    "a foreign name": (changed(lambda t: rename(t, "base_model.model.", "")), "does not write"),
    "another layer": (changed(lambda t: rename(t, "layers.0", "layers.9")), "another base"),
    "an odd width": (
        changed(lambda t: t.update({k: v[:, :-1].contiguous() for k, v in t.items()})),
        "b\\(b−1\\)/2",
    ),
    "too few blocks": (
        changed(lambda t: t.update({k: v[:-1].contiguous() for k, v in t.items()})),
        "shape",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_directory_is_refused(damage, tmp_path):
    edit, why = DAMAGE[damage]
    base, theirs = trained(CONFIGS["oft"]())
    theirs.save_pretrained(tmp_path)
    edit(tmp_path)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(CheckpointError, match=why):
        oftfx.load(base, tmp_path)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (HRAConfig(r=4, target_modules=TARGETS, apply_GS=True), "apply_GS"),
        (HRAConfig(r=3, target_modules=TARGETS), "even number"),
        (PsoftConfig(r=4, target_modules=TARGETS, psoft_svd="lowrank"), "lowrank"),
        (PsoftConfig(r=4, target_modules=TARGETS, psoft_orth=False), "psoft_orth"),
        (PsoftConfig(r=4, target_modules=TARGETS, psoft_mag_a=False), "psoft_mag_a"),
        (PsoftConfig(r=4, target_modules=TARGETS, cayley_neumann_eps=0.9), "cayley_neumann_eps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_variants_that_are_no_rotation_are_refused(config, why, tmp_path):
    base, theirs = trained(config)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=why):
        oftfx.load(base, tmp_path)


def test_psoft_says_that_it_computes_the_vectors_anew(tmp_path):
    base, theirs = trained(CONFIGS["psoft"]())
    theirs.save_pretrained(tmp_path)
    with pytest.warns(oftfx.OftfxWarning, match="oftfx.save"):
        oftfx.load(base, tmp_path)
