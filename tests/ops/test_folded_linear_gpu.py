"""Folding a float weight on a CUDA device, where it has to be asked for."""

import pytest
import torch
import torch.nn.functional as F

from oftfx import ops

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
