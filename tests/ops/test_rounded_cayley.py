"""`oftfx::rounded_cayley`: schema, fake, autograd, and who is served."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from oftfx import ops
from oftfx.ops.rounded_cayley import served

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16]


def random_theta(n: int, b: int, dtype: torch.dtype = torch.float32):
    return (0.1 * torch.randn(n, b * (b - 1) // 2)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_opcheck(parameters, dtype):
    theta = random_theta(3, 4, parameters)
    grad = torch.randn(3, 4, 4).to(dtype)
    torch.library.opcheck(torch.ops.oftfx.rounded_cayley_grad.default, (grad, theta, 4, 3))
    args = (theta.requires_grad_(), 4, 3, dtype)
    torch.library.opcheck(torch.ops.oftfx.rounded_cayley.default, args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1, 4, 5])
def test_without_a_kernel_the_exact_core_is_rounded(order, dtype):
    theta = random_theta(2, 6).requires_grad_()
    core = ops.rounded_cayley(theta, 6, order, dtype)
    assert torch.equal(core, ops.cayley(theta, 6, order).to(dtype))
    grad = torch.randn(2, 6, 6).to(dtype)
    (found,) = torch.autograd.grad(core, theta, grad)
    assert torch.equal(found, ops.cayley_grad(grad.float(), theta.detach(), 6, order))


def test_gradients_are_differentiable():
    theta = random_theta(2, 4, torch.float64).requires_grad_()
    grad = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g, t: ops.rounded_cayley_grad(g, t, 4, 4), (grad, theta))


def test_serves_bfloat16_where_a_kernel_rounds(monkeypatch):
    module = importlib.import_module("oftfx.ops.rounded_cayley")
    assert not served(torch.bfloat16, CPU)  # native kernels gain nothing by it
    monkeypatch.setattr(module, "kernels", lambda *_: SimpleNamespace(rounded=None))
    assert served(torch.bfloat16, CPU)
    assert not served(torch.float16, CPU)
    assert not served(torch.float32, CPU)


def test_a_kernel_does_the_work_where_it_fits(monkeypatch):
    module = importlib.import_module("oftfx.ops.rounded_cayley")
    marked = SimpleNamespace(
        rounded=lambda theta, b, order, dtype: torch.full((1, b, b), 7.0, dtype=dtype),
        rounded_grad=lambda grad, theta, b, order: torch.full_like(theta, 8.0),
        fits=lambda theta, b, order: theta.dtype == torch.float32,
    )
    monkeypatch.setattr(module, "kernels", lambda *_: marked)
    theta = random_theta(1, 66).requires_grad_()
    core = ops.rounded_cayley(theta, 66, 4, torch.bfloat16)
    core.sum().backward()
    assert (core == 7).all()
    assert (theta.grad == 8).all()
    double = theta.detach().double()
    expected = ops.cayley(double, 66, 4).bfloat16()
    assert torch.equal(ops.rounded_cayley(double, 66, 4, torch.bfloat16), expected)
