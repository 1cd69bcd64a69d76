"""HQQ: its layers are rotated, trained and folded, also back into their own format."""

import copy
import warnings

import pytest
import torch
from torch import nn

import oftfx
from oftfx import OFT, testing
from tests.quantised import assert_rounded, dequantised
from tests.small import rows

pytest.importorskip("hqq", reason="in the dev extra, but not on every machine with a GPU")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

SPEC = OFT(block_size=8, init_std=0.1)
X = rows(torch.float32, 64)


def make(linear: nn.Linear, bits: int = 4) -> nn.Module:
    config = BaseQuantizeConfig(nbits=bits, group_size=64)
    linear.requires_grad_(False)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


def base(bits: int = 4) -> nn.Module:
    torch.manual_seed(0)
    linears = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
    return nn.Sequential(make(linears[0], bits), nn.Tanh(), make(linears[1], bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rotated_trained_and_folded(bits):
    model = base(bits)
    assert [site.kind for site in oftfx.plan(model, SPEC, X).sites] == ["hqq", "hqq"]
    testing.assert_identity_at_init(model, OFT(block_size=8), X)
    words = [model[i].W_q.clone() for i in (0, 2)]
    adapted = oftfx.adapt(copy.deepcopy(model), SPEC, example_inputs=X)
    reference = oftfx.adapt(dequantised(model), SPEC, example_inputs=X)
    testing.assert_same_function(adapted, reference, X)
    assert all(torch.equal(adapted[i].W_q, w) for i, w in zip((0, 2), words, strict=True))
    expected = adapted(X)
    merged = oftfx.merge(adapted, dtype=torch.float32)
    assert type(merged[0]) is nn.Linear
    testing.assert_close(merged(X), expected, "output")


def test_requantised():
    model = oftfx.adapt(base(), SPEC, example_inputs=X)
    folded = oftfx.merge(copy.deepcopy(model), dtype=torch.float32)
    _, report = oftfx.merge(model, report=True, requantize=True)
    assert type(model[0]) is HQQLinear
    assert_rounded(report, model, folded, dequantised(base()), make)


def test_a_merge_that_is_stopped_leaves_a_model_that_computes_the_same(monkeypatch):
    model = oftfx.adapt(base(), SPEC, example_inputs=X)
    expected = model(X)

    def stopped(*args, **kwargs):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as stopping:
        stopping.setattr(HQQLinear, "quantize", stopped)
        with pytest.raises(torch.OutOfMemoryError):
            oftfx.merge(model, requantize=True)
    assert torch.equal(model(X), expected)


def test_saved_and_loaded(tmp_path):
    model = oftfx.adapt(base(), SPEC, example_inputs=X)
    oftfx.save(model, tmp_path)
    assert torch.equal(oftfx.load(base(), tmp_path)(X), model(X))
