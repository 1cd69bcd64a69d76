"""Products of tiles for wide blocks, of rotations and of cores, beside the float64 reference."""

import pytest
import torch

from oftfx import ops

kernel = pytest.importorskip("oftfx.ops.triton.wide")
cores = pytest.importorskip("oftfx.ops.triton.wide_cayley")

HALF = torch.float16
ROUNDING = 3e-4

# (rows, n, b): of one tile and of several, full and cut off
SIZES = [(5, 2, 128), (70, 1, 130)]


def case(count, rows, n, b, device):
    x, *grads = torch.randn(count + 1, rows, n * b, device=device).to(HALF).unbind()
    # As the reference computes: with the cores in x's dtype.
    given = (0.3 / b**0.5 * torch.randn(count, n, b, b, device=device)).to(HALF).float()
    return x, grads, list(given.unbind())


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("rows", "n", "b"), SIZES)
def test_rotates_as_the_reference_does(rows, n, b, device):
    x, _, (core,) = case(1, rows, n, b, device)
    rotated = kernel.turned(x, core)
    assert rotated.dtype == HALF
    assert error(rotated, ops.rotate(x.double(), core.double())) < ROUNDING


@pytest.mark.parametrize(("rows", "n", "b"), SIZES)
def test_gradients_of_a_group_are_the_references(rows, n, b, device):
    x, grads, given = case(3, rows, n, b, device)
    double = [grad.double() for grad in grads], x.double(), [core.double() for core in given]
    exact_x, exact_cores = ops.rotate_group_grad(*double, need_x=True, need_cores=True)
    assert error(kernel.returned(grads, given), exact_x) < ROUNDING
    for value, exact in zip(kernel.grams(x, grads, given), exact_cores, strict=True):
        assert value.dtype == torch.float32
        assert error(value, exact) < 1e-5


def test_operands_may_have_any_strides(device):
    _, _, (core,) = case(1, 1, 2, 128, device)
    wide = torch.randn(3, 2, 261, device=device).to(HALF)
    x, grads = wide[..., 2:-3].transpose(0, 1), [wide[..., 5:].transpose(0, 1), wide[1, 0, :256]]
    grads = [grad.expand(2, 3, 256) for grad in grads]
    given = [core, core.mT]
    double = [grad.double() for grad in grads], x.double(), [core.double() for core in given]
    exact_x, exact_cores = ops.rotate_group_grad(*double, need_x=True, need_cores=True)
    assert error(kernel.turned(x, core.mT), ops.rotate(x.double(), core.mT.double())) < ROUNDING
    assert error(kernel.returned(grads, given), exact_x) < ROUNDING
    for value, exact in zip(kernel.grams(x, grads, given), exact_cores, strict=True):
        assert error(value, exact) < 1e-5


@pytest.mark.parametrize("order", [1, 3, 4, 6])
def test_cores_and_their_gradients_lose_less_than_sixteen_bits(order, device):
    n, b = 1, 66
    theta = 0.3 / b**0.5 * torch.randn(n, b * (b - 1) // 2, device=device)
    grad = torch.randn(n, b, b, device=device)
    exact = ops.cayley(theta.double(), b, order)
    assert error(cores.cayley(theta, b, order), exact) < 1e-5
    exact = ops.cayley_grad(grad.double(), theta.double(), b, order)
    assert error(cores.cayley_grad(grad, theta, b, order), exact) < 1e-5


def test_serves_neighbours_of_16_bits_in_wide_blocks():
    x, core = torch.zeros(1, 256, dtype=HALF), torch.zeros(2, 128, 128)
    assert kernel.serves(x, core)
    assert not kernel.serves(x, core, 2)
    assert not kernel.serves(x.float(), core)
    assert not kernel.serves(x, core[:, :64, :64])
