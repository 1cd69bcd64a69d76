"""Where PEFT's result is wrong ours is right; each of its faults is seen in the pinned version."""

import copy
import warnings

import pytest
import torch
from peft import BOFTConfig, HRAConfig, OFTConfig, PeftModel, PsoftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import oftfx
from tests.quantised import dequantised, linear4bit, linear8bit, quantised
from tests.small import llama, tokens

X = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
OFT = {"oft_block_size": 8, "r": 0, "init_weights": False}


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval()


def written(directory, model, config):
    """PEFT's model with rotations that turn, and where it wrote them."""
    torch.manual_seed(2)
    theirs = get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(directory)
    return theirs


def apart(one, other):
    return float((one - other).norm() / other.norm())


@torch.no_grad()
def test_hra_on_8_bits(tmp_path):
    theirs = written(tmp_path, base(), HRAConfig(r=4, target_modules=["0", "2"]))
    with torch.no_grad():  # away from pairs that cancel
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    small = quantised(base(), linear8bit)
    ours = oftfx.load(copy.deepcopy(small), tmp_path)
    right = oftfx.load(dequantised(small), tmp_path)(X)
    assert apart(ours(X), right) < 0.02  # 8 bits round the activations, too
    assert apart(PeftModel.from_pretrained(small, tmp_path).eval()(X), right) > 0.2


@torch.no_grad()
def test_a_linear_layer_of_four_dimensions(tmp_path):
    theirs = written(tmp_path, base(), OFTConfig(target_modules=["0", "2"], **OFT))
    expected = theirs(X)
    ours = oftfx.load(base(), tmp_path)
    assert apart(ours(X[None])[0], expected) < 1e-5
    with pytest.raises(RuntimeError):
        theirs(X[None])


@torch.no_grad()
def test_two_adapters_fold_in_the_order_that_they_compose(tmp_path):
    config = OFTConfig(target_modules=["0", "2"], **OFT)
    theirs = written(tmp_path / "one", base(), config)
    torch.manual_seed(3)
    other = get_peft_model(base(), config)
    other.save_pretrained(tmp_path / "two")
    theirs.load_adapter(tmp_path / "two", "two")
    theirs.base_model.set_adapter(["default", "two"])
    expected = theirs(X)
    ours = oftfx.load(oftfx.load(base(), tmp_path / "one"), tmp_path / "two", "two")
    assert apart(ours(X), expected) < 1e-5
    assert apart(oftfx.merge(ours)(X), expected) < 1e-5
    assert apart(theirs.merge_and_unload()(X), expected) > 1e-3


def test_dropout_drops(tmp_path):
    """PEFT's has no effect; ours, read from the same config, has."""
    config = OFTConfig(target_modules=["0", "2"], module_dropout=0.5, **OFT)
    theirs = written(tmp_path, base(), config)
    assert torch.equal(theirs.train()(X), theirs(X))
    ours = oftfx.load(base(), tmp_path)
    assert torch.equal(ours.eval()(X), ours(X))
    assert not torch.equal(ours.train()(X), ours(X))


@torch.no_grad()
def test_boft_of_several_factors_without_the_extension(tmp_path):
    """It trains one; the file tells, its config does not."""
    fields = {"boft_block_size": 8, "boft_n_butterfly_factor": 2, "init_weights": False}
    theirs = written(tmp_path, base(), BOFTConfig(target_modules=["0", "2"], **fields))
    assert theirs.base_model.model[0].boft_R["default"].shape[0] == 1
    with pytest.warns(oftfx.OftfxWarning, match="asks for 2 butterfly factors"):
        ours = oftfx.load(base(), tmp_path)
    assert apart(ours(X), theirs(X)) < 1e-5


@torch.no_grad()
def test_merging_a_tied_embedding_leaves_the_head(tmp_path):
    model = llama()
    config = OFTConfig(target_modules=["embed_tokens"], **OFT)
    theirs = written(tmp_path, model, config)
    expected = theirs(**tokens()).logits
    ours = oftfx.load(model, tmp_path)
    assert apart(oftfx.merge(ours)(**tokens()).logits, expected) < 1e-5
    assert apart(theirs.merge_and_unload()(**tokens()).logits, expected) > 0.1


@torch.no_grad()
def test_a_convolution_is_refused(tmp_path):
    """PEFT's unfolds the input without the layer's stride and padding."""
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = written(tmp_path, net, OFTConfig(target_modules=["0"], **OFT))
    images = torch.randn(1, 8, 4, 4)
    theirs.base_model.model[0].oft_R["default"].weight.zero_()  # the identity
    assert apart(theirs.base_model.model[0](images), net[0](images)) > 0.1
    with pytest.raises(oftfx.CheckpointError, match="0: "):
        oftfx.load(net, tmp_path)


@torch.no_grad()
def test_quantised_layers_that_it_refuses(tmp_path):
    written(tmp_path, base(), HRAConfig(r=4, target_modules=["0", "2"]))
    small = quantised(base(), linear4bit)
    right = oftfx.load(dequantised(small), tmp_path)(X)
    assert apart(oftfx.load(copy.deepcopy(small), tmp_path)(X), right) < 1e-5
    with pytest.raises(RuntimeError):
        PeftModel.from_pretrained(copy.deepcopy(small), tmp_path)(X)
    with pytest.raises(TypeError, match="float32"):
        get_peft_model(copy.deepcopy(small), PsoftConfig(r=4, target_modules=["0", "2"]))
    oftfx.adapt(small, oftfx.PSOFT(rank=4), example_inputs=X)


@torch.no_grad()
def test_an_adapter_for_each_row(tmp_path):
    config = OFTConfig(target_modules=["0", "2"], **OFT)
    theirs = written(tmp_path, base(), config)
    expected = torch.stack([theirs(X)[0], base()(X)[1]])
    ours = oftfx.load(base(), tmp_path)
    with oftfx.rows(ours, ["default", None]):
        assert apart(ours(X), expected) < 1e-5
    assert torch.equal(theirs(X, adapter_names=["default", "__base__"]), theirs(X))


@torch.no_grad()
def test_a_layer_that_the_config_names_and_the_file_lacks(tmp_path):
    """PEFT says so as well; ours must not pass it over."""
    written(tmp_path, base(), OFTConfig(target_modules=["0", "2"], **OFT))
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    save_file({key: value for key, value in held.items() if ".0." not in key}, file)
    with pytest.warns(oftfx.OftfxWarning, match="has no tensor of 0, which target_modules"):
        ours = oftfx.load(base(), tmp_path)
    assert [name for name, part in ours.named_modules() if hasattr(part, "oft")] == ["2"]
