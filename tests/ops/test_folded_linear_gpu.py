"""Folding a float weight on a CUDA device, where it has to be asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oftfx
from oftfx import OFT, ops, testing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_value_and_gradients_are_those_of_rotating_x(dtype):
    x = torch.randn(200, 96, device="cuda", dtype=dtype, requires_grad=True)
    core = (0.05 * torch.randn(3, 32, 32, device="cuda")).requires_grad_()
    weight = torch.randn(64, 96, device="cuda", dtype=dtype)
    grad = torch.randn(200, 64, device="cuda", dtype=dtype)
    value = ops.folded_linear(x, core, weight)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, core)]
    exact = F.linear(ops.rotate(*wide), weight.double())
    got = torch.autograd.grad(value, (x, core), grad)
    expected = torch.autograd.grad(exact, wide, grad.double())
    for one, other in zip((value, *got), (exact, *expected), strict=True):
        assert (one.double() - other).norm() < 3e-2 * (1e-2 if dtype.itemsize == 4 else 1) * (
            other.norm()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("b", [4, 32, 64, 128])
def test_the_forward_has_the_bits_of_the_merged_layer(b, dtype):
    layer = nn.Linear(512, 3001, device="cuda", dtype=dtype)
    x = torch.randn(70, 512, device="cuda", dtype=dtype)
    spec = OFT(block_size=b, dtype=torch.float32)
    adapted = oftfx.adapt(nn.Sequential(layer), spec, example_inputs=x)
    testing.randomize(adapted)
    ((core, *_),) = (factor.operands for factor in adapted[0].oft["default"].factors())
    exact = ops.rotate(layer.weight.double(), core.double().mT)
    y = ops.folded_linear(x, core, layer.weight, layer.bias)
    merged = oftfx.merge(adapted)[0]
    assert torch.equal(F.linear(x, merged.weight, merged.bias), y)
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    assert (merged.weight.double() - exact).norm() <= rounding / 2 * exact.norm()
