"""What PEFT wrote computes here what it computes there, and the other way round."""

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import BOFTConfig, HRAConfig, OFTConfig, PeftModel, PsoftConfig, get_peft_model
from peft.tuners.boft import layer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import oftfx
from oftfx import CheckpointError
from oftfx.interop.peft.directory import COMMON
from oftfx.interop.peft.formats import FORMATS
from tests.quantised import linear4bit, linear8bit, quantised
from tests.small import VOCABULARY, llama, tokens

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["q_proj", "v_proj", "down_proj"]


def on(make, **fields):
    return lambda: make(target_modules=TARGETS, **fields)


def oft(**fields):
    return on(OFTConfig, **{"oft_block_size": 8, "r": 0, **fields})


CONFIGS = {
    "oft": oft(),
    "oft, by number of blocks": oft(oft_block_size=0, r=4),
    "oft, adjusted": oft(oft_block_size=10),
    "oft, 3 terms": oft(num_cayley_neumann_terms=3),
    "oft, 7 terms": oft(num_cayley_neumann_terms=7),
    "oft, exact": oft(use_cayley_neumann=False),
    "oft, shared": oft(block_share=True),
    "oft, all biases": oft(bias="all"),
    "oft, own biases": oft(bias="oft_only"),
    "oft, modules": oft(modules_to_save=["norm", "lm_head"]),
    "oft, modules and biases": oft(modules_to_save=["o_proj"], bias="all"),
    "oft, embedding": lambda: OFTConfig(
        oft_block_size=8, r=0, target_modules=["embed_tokens", "lm_head", "q_proj"]
    ),
    "coft": oft(coft=True, eps=0.1),
    "boft": on(BOFTConfig, boft_block_size=8),
    "boft, 3 factors": on(BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=3),
    "boft, by number of blocks": on(
        BOFTConfig, boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=2
    ),
    "boft, own biases": on(BOFTConfig, boft_block_size=8, bias="boft_only"),
    "hra": on(HRAConfig, r=4),
    "hra, modules and biases": on(HRAConfig, r=4, bias="hra_only", modules_to_save=["lm_head"]),
    "psoft": on(PsoftConfig, r=4),
    "psoft, strict": on(PsoftConfig, r=4, psoft_mag_a=False, psoft_mag_b=False),
    "psoft, series": on(PsoftConfig, r=4, use_cayley_neumann=True),
}


class Blocks:
    """What PEFT's CUDA extension computes; without it, PEFT trains one factor alone."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*factor.unbind()) for factor in blocks])


@pytest.fixture(autouse=True)
def extension(monkeypatch):
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)


def model(width=32):
    """Always the same one, with biases."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 3 // 2 if width < 64 else 2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
        attention_bias=True,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    base = LlamaForCausalLM(config).eval()
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return base


def trained(config, base=None):
    """A base, and PEFT's model of it with rotations away from the identity."""
    base = model() if base is None else base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(base), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                step = 0.05 * torch.randn_like(parameter)
                if "boft_R" in name:  # as its gradient is
                    step = step - step.mT
                parameter.add_(step)
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


@pytest.mark.parametrize(
    "kind", ["oft", "oft, all biases", "oft, modules", "oft, embedding", "boft, own biases"]
)
@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_reads_the_same_function_on_a_quantised_base(make, kind, tmp_path):
    def base():
        return quantised(model(64), make)

    _, theirs = trained(CONFIGS[kind](), base())
    theirs.save_pretrained(tmp_path / "peft")
    ours = oftfx.load(base(), tmp_path / "peft").eval()
    agree(ours, theirs)
    oftfx.save(ours, tmp_path / "again", format="peft")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "peft" / FILE).read_bytes()
    again = PeftModel.from_pretrained(base(), tmp_path / "again").eval()
    agree(ours, again)


@pytest.mark.filterwarnings("ignore:.*singular vectors")
def test_read_then_written_is_the_same_file(written, tmp_path):
    base, theirs, path = written
    theirs(**tokens())  # where COFT projects its parameters
    theirs.save_pretrained(path)
    oftfx.save(oftfx.load(base, path), tmp_path / "again", format="peft")
    assert (tmp_path / "again" / FILE).read_bytes() == (path / FILE).read_bytes()


def turned(model, spec):
    """The model, adapted and turned."""
    ours = oftfx.adapt(model, spec).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in oftfx.parameters(ours):
            parameter.add_(0.05 * torch.randn_like(parameter))
    oftfx.project(ours)
    return ours


@pytest.mark.parametrize(
    "spec",
    [
        oftfx.OFT(block_size=8, order=4),
        oftfx.OFT(block_size=8, order=2, share_inputs=True),
        oftfx.OFT(block_size=8, exact=True),
        oftfx.OFT(block_size=8, share_blocks=True),
        oftfx.COFT(block_size=8, eps=0.1),
        oftfx.OFT(block_size=8, targets=["embed_tokens", "q_proj"], exact=True),
        oftfx.BOFT(block_size=8, factors=2, exact=True),
        oftfx.BOFT(block_size=8, factors=1, exact=True, magnitude=True, also_train="bias"),
        oftfx.HRA(rank=4, init_std=0.1),
        oftfx.PSOFT(rank=4, svd="full"),
        oftfx.PSOFT(rank=4, svd="full", relaxed=False, exact=True),
        oftfx.OFT(block_size=8, also_train=["lm_head", "norm"]),
        oftfx.OFT(block_size=8, targets="q_proj", also_train="q_proj.bias"),
        oftfx.HRA(rank=4, also_train=["o_proj", "bias"]),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_peft_loads_what_is_written(spec, tmp_path):
    base = model()
    ours = turned(copy.deepcopy(base), spec)
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
        (oftfx.HRA(rank=4, overrides={"q_proj": {"rank": 2}}), "one for all"),
        (oftfx.GOFT(), "GOFT"),
        (oftfx.LOFT(rank=4, support="random"), "LOFT"),
        (oftfx.OFT(block_size=8, doubled=True), "0.17"),
        (oftfx.OFT(block_size=8, magnitude=True), "magnitude"),
        (oftfx.BOFT(block_size=8), "exact=True"),
        (oftfx.BOFT(block_size=8, exact=True, share_blocks=True), "share_blocks"),
        (oftfx.PSOFT(rank=4, share_inputs=True), "singular vectors"),
        (oftfx.PSOFT(rank=4, svd="full", also_train="bias"), "no bias"),
        (oftfx.HRA(rank=4, targets="embed_tokens"), "no embeddings"),
        (oftfx.OFT(block_size=8, also_train="v_proj.bias"), "not some"),
        (oftfx.OFT(block_size=8, targets="q_proj", also_train="o_proj.weight"), "whole modules"),
    ],
)
def test_what_peft_cannot_express_is_refused(spec, why, tmp_path):
    adapted = oftfx.adapt(model(), spec)
    with pytest.raises(CheckpointError, match=why):
        oftfx.save(adapted, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_a_name_that_peft_would_take_for_another_is_refused(tmp_path):
    net = nn.ModuleDict(
        {"norm": nn.LayerNorm(8), "prenorm": nn.LayerNorm(8), "fc": nn.Linear(8, 8)}
    )
    spec = oftfx.OFT(block_size=4, targets="fc", also_train="norm")
    oftfx.adapt(net, spec, capture="modules")
    with pytest.raises(CheckpointError, match="PEFT would take it for norm"):
        oftfx.save(net, tmp_path / "out", format="peft")


class Ends(nn.Module):
    """A name of a layer is the end of others' names, one of which PEFT cannot adapt."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.q = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blk = nn.ModuleDict({"fc": nn.Linear(8, 8), "q": nn.LayerNorm(8)})

    def forward(self, x):
        return self.blk["fc"](self.blk["q"](self.fc(self.q(x))))


@pytest.mark.parametrize("targets", [["fc", "q"], "(?:q)", "(?:fc)", "blk.fc"])
@pytest.mark.parametrize("format", ["peft", "lora"])
def test_a_name_that_is_the_end_of_another_is_of_its_own_layer(format, targets, tmp_path):
    x = torch.randn(3, 8)
    spec = oftfx.HRA(rank=2, init_std=0.5, targets=targets)
    model = oftfx.adapt(Ends(), spec, example_inputs=x)
    oftfx.save(model, tmp_path, format=format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT's, of layers that the file lacks
        theirs = PeftModel.from_pretrained(Ends(), tmp_path)
    torch.testing.assert_close(theirs(x), model(x))
    if format == "peft":
        ours = oftfx.load(Ends(), tmp_path)
        assert torch.equal(ours(x), model(x))


@pytest.mark.parametrize("spec", [oftfx.OFT(block_size=4), oftfx.HRA(rank=2)])
def test_a_conv1d_is_refused(spec, tmp_path):
    model = oftfx.adapt(nn.Sequential(Conv1D(8, 8)), spec, example_inputs=torch.randn(2, 8))
    with pytest.raises(CheckpointError, match=r"0 is a Conv1D, of which PEFT has no"):
        oftfx.save(model, tmp_path, format="peft")


def test_psoft_of_quantised_layers_is_refused(tmp_path):
    adapted = oftfx.adapt(quantised(model(64), linear4bit), oftfx.PSOFT(rank=4, svd="full"))
    with pytest.raises(CheckpointError, match="is quantised"):
        oftfx.save(adapted, tmp_path / "out", format="peft")


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


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def as_pickle(path):
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(path / "executed")))
    (path / FILE).unlink()


def cut(path):
    (path / FILE).write_bytes((path / FILE).read_bytes()[:-7])


def each(change):
    return changed(lambda tensors: tensors.update({k: change(v) for k, v in tensors.items()}))


DAMAGE = {
    "no config": (lambda path: (path / CONFIG).unlink(), "nor an adapter_config.json"),
    "not finite": (each(lambda v: v / 0), "not finite"),
    "integers": (each(lambda v: v.int()), "int32, not floating"),
    "8 bits": (each(lambda v: v.to(torch.float8_e4m3fn)), "16 bits"),
    "one more dimension": (each(lambda v: v[None].clone()), "b\\(b−1\\)/2"),
    "an unknown bias": (changed(lambda t: t.update(one("q_proj.base_layer.zias"))), "nor a tensor"),
    "a bias of another shape": (
        changed(lambda t: t.update(one("q_proj.base_layer.bias"))),
        r"q_proj.bias is \(32,\) here, \(3,\) there",
    ),
    "another kind of layer": (
        changed(lambda t: rename(t, "oft_R.weight", "oft_embedding_R.weight")),
        "embedding there or here",
    ),
    "another method": (edited(peft_type="LORA"), "LORA"),
    "no method": (lambda path: (path / CONFIG).write_text("{}"), "peft_type"),
    "no JSON": (lambda path: (path / CONFIG).write_text("{"), "damaged"),
    "a text for a number": (edited(num_cayley_neumann_terms="5"), "num_cayley_neumann_terms"),
    "too few terms": (edited(num_cayley_neumann_terms=2), "terms=2"),
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


def one(leaf):
    return {f"base_model.model.model.layers.0.self_attn.{leaf}": torch.zeros(3)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_directory_is_refused(damage, tmp_path):
    edit, why = DAMAGE[damage]
    base, theirs = trained(CONFIGS["oft"]())
    theirs.save_pretrained(tmp_path)
    edit(tmp_path)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(CheckpointError, match=why):
        oftfx.load(base, tmp_path)
    assert not (tmp_path / "executed").exists()
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("kind", "tensor"), [("boft", "boft_s"), ("psoft", "vector_b"), ("oft, modules", None)]
)
@pytest.mark.filterwarnings("ignore:.*singular vectors")
def test_another_base_or_a_missing_tensor_is_refused(kind, tensor, tmp_path):
    _, theirs = trained(CONFIGS[kind]())
    theirs.save_pretrained(tmp_path)
    base, why = model(), "lacks"
    if tensor is None:
        base, why = model(64), "another base"
    else:
        changed(lambda t: t.pop(next(key for key in t if tensor in key)))(tmp_path)
    with pytest.raises(CheckpointError, match=why):
        oftfx.load(base, tmp_path)
    assert not any(".oft." in key for key in base.state_dict())


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


@pytest.mark.parametrize("config", [OFTConfig, BOFTConfig, HRAConfig, PsoftConfig])
def test_every_field_of_a_config_is_known(config):
    names = {field.name for field in dataclasses.fields(config)}
    assert names | {"bias"} == COMMON | FORMATS[config().peft_type.value].FIELDS


def test_what_is_computed_anew_or_not_heeded_is_told(tmp_path):
    base, theirs = trained(PsoftConfig(r=4, target_modules=TARGETS, psoft_dropout=0.1))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "later": 3, "unused": None}))
    with pytest.warns(oftfx.OftfxWarning) as told:
        oftfx.load(base, tmp_path)
    later, dropout, *vectors = (str(each.message) for each in told)
    assert "later=3 is of a later PEFT" in later
    assert "psoft_dropout=0.1" in dropout
    assert all("save with oftfx.save" in each for each in vectors)
