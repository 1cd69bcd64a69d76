"""torchao: Linears over quantised tensors are rotated, trained and folded, or refused by name."""

import copy
import warnings

import pytest
import torch
from torch import nn

import oftfx
from oftfx import OFT, MergeError, PlanError, testing
from tests.quantised import dequantised, float_llama
from tests.small import rows, tokens

pytest.importorskip("torchao", reason="in the dev extra, but not on every machine with a GPU")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )

SPEC = OFT(block_size=8, init_std=0.1)
WEIGHT_ONLY = {
    "int8": lambda: Int8WeightOnlyConfig(),
    "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4),
    "float8": lambda: Float8WeightOnlyConfig(),
}
every_format = pytest.mark.parametrize("config", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY.keys())


def base(config) -> nn.Module:
    model = float_llama()
    quantize_(model.model, config())
    return model


@every_format
def test_every_layer_is_a_site(config):
    model, floating = base(config), oftfx.plan(float_llama(), SPEC)
    for capture in ("graph", "modules"):
        plan = oftfx.plan(model, SPEC, capture=capture)
        assert {site.kind for site in plan.sites} == {"torchao"}
        assert [(s.fqn, s.shape) for s in plan.sites] == [(s.fqn, s.shape) for s in floating.sites]
    testing.assert_identity_at_init(model, OFT(block_size=8), tokens())


@every_format
def test_gradients_are_those_of_dequantising_and_rotating(config):
    model = base(config)
    adapted = oftfx.adapt(copy.deepcopy(model), SPEC)
    reference = oftfx.adapt(dequantised(model), SPEC)
    testing.assert_same_function(adapted, reference, tokens())


@every_format
def test_trained_merged_and_removed(config):
    model = base(config)
    untouched = copy.deepcopy(model)
    expected = model(**tokens()).logits
    oftfx.adapt(model, SPEC)
    optimizer = torch.optim.SGD(oftfx.parameters(model), lr=0.01)
    model(**tokens(), labels=tokens()["input_ids"]).loss.backward()
    optimizer.step()
    adapted = model(**tokens()).logits
    merged = oftfx.merge(copy.deepcopy(model), dtype=torch.float32)
    assert {type(p) for p in merged.parameters()} == {nn.Parameter}
    testing.assert_close(merged(**tokens()).logits, adapted, "logits")
    oftfx.remove(model)
    assert torch.equal(model(**tokens()).logits, expected)
    for one, other in zip(model.parameters(), untouched.parameters(), strict=True):
        assert type(one) is type(other)


@every_format
def test_saved_and_loaded(config, tmp_path):
    model = oftfx.adapt(base(config), SPEC)
    oftfx.save(model, tmp_path)
    loaded = oftfx.load(base(config), tmp_path)
    assert torch.equal(loaded(**tokens()).logits, model(**tokens()).logits)


def test_requantising_is_refused_before_anything_changes():
    model = oftfx.adapt(base(Int8WeightOnlyConfig), SPEC)
    expected = model(**tokens()).logits
    with pytest.raises(MergeError, match=r"q_proj: torchao layers are not quantised anew"):
        oftfx.merge(model, requantize=True)
    assert torch.equal(model(**tokens()).logits, expected)


def test_a_layer_without_a_gradient_is_refused_by_name():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32))
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), lambda _, fqn: fqn == "1")
    x = rows(torch.float32, 64)
    for capture in ("graph", "modules"):
        for targets in ("all-linear", "0", "1"):  # rotations before it would not train either
            spec = OFT(block_size=8, targets=targets)
            with pytest.raises(PlanError, match=r"1: .*Linear gives no gradient to its input"):
                oftfx.adapt(model, spec, example_inputs=x, capture=capture)
    # who leaves it out by name knows what they do
    oftfx.adapt(model, OFT(block_size=8, exclude=["0", "1"]), example_inputs=x)
    assert len(oftfx.parameters(model)) == 1
