"""The core kernels beside the float64 reference."""

import pytest
import torch

from oftfx import ops

kernel = pytest.importorskip("oftfx.ops.triton.cayley")

# (n, b): one block, several in a tile, a tile with padding, and a number that fills no tile
SIZES = [(5, 2), (9, 3), (3, 4), (7, 5), (2, 16), (2, 31), (3, 32), (2, 33), (1, 64)]


GRADIENT = 1e-5 if torch.cuda.is_available() else 1e-6
"""There they are products of bf16 parts."""


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def random_theta(n: int, b: int, device: torch.device) -> torch.Tensor:
    return 0.3 / b**0.5 * torch.randn(n, b * (b - 1) // 2, device=device)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("n", "b"), SIZES)
def test_cores_keep_float32_digits(n, b, order, device):
    theta = random_theta(n, b, device)
    core = kernel.cayley(theta, b, order)
    assert core.dtype == torch.float32
    assert error(core, ops.cayley(theta.double(), b, order)) < 1e-6


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("n", "b"), SIZES)
def test_gradients_are_the_references(n, b, order, device):
    theta, grad = random_theta(n, b, device), torch.randn(n, b, b, device=device)
    exact = ops.cayley_grad(grad.double(), theta.double(), b, order)
    assert error(kernel.cayley_grad(grad, theta, b, order), exact) < GRADIENT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_parameters_are_widened_first_and_their_gradient_rounded_last(dtype, device):
    theta, grad = random_theta(3, 8, device).to(dtype), torch.randn(3, 8, 8, device=device)
    assert error(kernel.cayley(theta, 8, 4), ops.cayley(theta.double(), 8, 4)) < 1e-6
    ours = kernel.cayley_grad(grad, theta, 8, 4)
    assert ours.dtype == dtype
    exact = ops.cayley_grad(grad.double(), theta.double(), 8, 4)
    assert error(ours, exact) < torch.finfo(dtype).eps


# The interpreter multiplies no bfloat16.
SHORT = [torch.float16, *[torch.bfloat16] * torch.cuda.is_available()]


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("n", "b"), [(9, 3), (3, 16), (3, 32), (2, 33)])
def test_rounded_cores_are_at_most_twice_as_far_off_as_the_nearest(n, b, order, dtype, device):
    theta = random_theta(n, b, device)
    exact = ops.cayley(theta.double(), b, order)
    core = kernel.rounded(theta, b, order, dtype)
    assert core.dtype == dtype
    nearest = error(exact.to(dtype), exact)
    assert nearest / 10 < error(core, exact) < 2 * nearest
    turned = torch.eye(b, device=device) + core.double()
    gram = turned.mT @ turned
    reference = torch.eye(b, device=device) + exact
    expected = reference.mT @ reference
    assert (gram - expected).norm() < 0.5 * torch.finfo(dtype).eps * (n * b) ** 0.5


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("n", "b"), [(9, 3), (3, 16), (3, 32), (2, 33)])
def test_their_gradients_lose_what_their_dtype_rounds(n, b, order, dtype, device):
    theta, grad = random_theta(n, b, device), torch.randn(n, b, b, device=device).to(dtype)
    exact = ops.cayley_grad(grad.double(), theta.double(), b, order)
    value = kernel.rounded_grad(grad, theta, b, order)
    assert value.dtype == theta.dtype
    assert error(value, exact) < torch.finfo(dtype).eps


@pytest.mark.parametrize("order", [1, 4, 5])
def test_zero_parameters_give_exactly_zero(order, device):
    core = kernel.cayley(torch.zeros(3, 496, device=device), 32, order)
    assert torch.equal(core, torch.zeros_like(core))


def test_operands_may_have_any_strides(device):
    theta = random_theta(6, 4, device).T.contiguous().T
    grad = torch.randn(4, 4, device=device).expand(6, 4, 4)
    assert not theta.is_contiguous()
    assert not grad.is_contiguous()
    assert error(kernel.cayley(theta, 4, 4), ops.cayley(theta.double(), 4, 4)) < 1e-6
    exact = ops.cayley_grad(grad.double(), theta.double(), 4, 4)
    assert error(kernel.cayley_grad(grad, theta, 4, 4), exact) < GRADIENT


def test_no_blocks_give_no_cores(device):
    theta = torch.zeros(0, 6, device=device)
    assert kernel.cayley(theta, 4, 4).shape == (0, 4, 4)
    assert kernel.cayley_grad(torch.zeros(0, 4, 4, device=device), theta, 4, 4).shape == (0, 6)


def test_serves_series_of_blocks_of_any_width():
    theta = torch.zeros(1, 6)
    assert kernel.fits(theta, 4, 4)
    assert kernel.fits(torch.zeros(1, 65 * 32), 65, 4)
    assert not kernel.fits(theta, 4, None)
    assert not kernel.fits(theta.double(), 4, 4)
