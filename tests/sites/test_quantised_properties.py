"""Whatever the shape, the dtype and the format: rotated, trained and folded as its floats are."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oftfx
from oftfx import OFT, testing
from tests.quantised import assert_unchanged, dequantised, linear4bit, linear8bit, quantised, stored

WIDTHS = st.sampled_from([64, 128, 192])  # multiples of the 4-bit block size


@st.composite
def cases(draw):
    """A chain of quantised layers of any format, its spec, and an input."""
    widths = draw(st.lists(WIDTHS, min_size=2, max_size=3))
    seed = draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        linear = nn.Linear(narrow, wide, bias=draw(st.booleans()))
        if draw(st.booleans()):
            quant_type = draw(st.sampled_from(["nf4", "fp4"]))
            double = draw(st.booleans())
            block = draw(st.sampled_from([b for b in (32, 64, 128) if narrow % b == 0]))
            storage = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]))
            made = linear4bit(linear, quant_type, double, block, storage=storage)
        else:
            made = linear8bit(linear)
        layers += [made, nn.Tanh()]
    spec = OFT(
        block_size=draw(st.sampled_from([4, 16, 32])),
        order=draw(st.integers(1, 6)),
        init_std=0.03,
        seed=seed,
    )
    shape = draw(st.sampled_from([(3,), (1,), (2, 5)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    return nn.Sequential(*layers).train(), spec, torch.randn(*shape, widths[0]).to(dtype)


@given(cases())
def test_a_rotated_quantised_chain(case):
    model, spec, x = case
    model(x)  # int8 hands its statistics from the weight to the layer
    before, expected = stored(model), model(x)
    adapted = oftfx.adapt(copy.deepcopy(model), spec, capture="modules")
    reference = oftfx.adapt(dequantised(model).to(x.dtype), spec, capture="modules")
    within = 2 * testing.tolerance(x.dtype)  # the layers round to it after every matmul
    testing.assert_same_function(adapted, reference, x, within)

    optimizer = torch.optim.SGD(oftfx.parameters(adapted), lr=1e-3)
    adapted(x).square().sum().backward()
    optimizer.step()
    assert_unchanged(adapted, before)

    rotated = adapted(x)
    merged = oftfx.merge(copy.deepcopy(adapted), dtype=x.dtype)
    testing.assert_close(merged(x), rotated, "merged", within)
    assert torch.equal(oftfx.remove(adapted)(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    torch.manual_seed(0)
    model = quantised(nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)), linear4bit).train()
    x = torch.randn(4, 64, dtype=dtype)
    model.to(dtype)
    adapted = oftfx.adapt(model, OFT(block_size=16, init_std=0.05), example_inputs=x)
    y = adapted(x)
    assert y.dtype is dtype
    merged = oftfx.merge(copy.deepcopy(adapted), dtype=dtype)
    testing.assert_close(merged(x), y, "merged")
