"""Products of tiles for wide blocks, of rotations and of cores, beside the float64 reference."""

import pytest
import torch

from oftfx import ops

kernel = pytest.importorskip("oftfx.ops.triton.wide")
cores = pytest.importorskip("oftfx.ops.triton.wide_cayley")

all_cores = pytest.importorskip("oftfx.ops.triton.cayley")

HALF = torch.float16
CPU = torch.device("cpu")
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


@pytest.mark.parametrize("order", [1, 3, 4, 6])
@pytest.mark.parametrize("b", [66, 128])
def test_rounded_cores_and_their_gradients_lose_what_sixteen_bits_do(b, order, device):
    theta = 0.3 / b**0.5 * torch.randn(2, b * (b - 1) // 2, device=device)
    grad = torch.randn(2, b, b, device=device).to(HALF)
    exact = ops.cayley(theta.double(), b, order)
    core = all_cores.rounded(theta, b, order, HALF)
    assert core.dtype == HALF
    assert error(core, exact) < 2 * error(exact.to(HALF), exact)
    turn = core.double() + torch.eye(b, device=device)
    ideal = exact + torch.eye(b, device=device)
    assert error(turn.mT @ turn, ideal.mT @ ideal) < 2 * ROUNDING
    exact = ops.cayley_grad(grad.double(), theta.double(), b, order)
    found = all_cores.rounded_grad(grad, theta, b, order)
    assert found.dtype == theta.dtype
    assert error(found, exact) < 3 * ROUNDING


def test_no_blocks_give_no_rounded_cores(device):
    theta = torch.zeros(0, 66 * 65 // 2, device=device)
    core = all_cores.rounded(theta, 66, 4, HALF)
    assert core.shape == (0, 66, 66)
    assert all_cores.rounded_grad(core, theta, 66, 4).shape == theta.shape


def test_few_blocks_find_their_grams_in_runs_and_many_in_one(monkeypatch):
    monkeypatch.setattr(kernel, "processors", lambda device: 132)
    splits = {
        (n, count): kernel._gram_work(4096, n, 256, (HALF, HALF), (9, 9), count, CPU).splits
        for n, count in ((14, 1), (14, 2), (14, 3), (74, 1))
    }
    assert splits == {(14, 1): 2, (14, 2): 1, (14, 3): 1, (74, 1): 1}
    assert kernel._gram_work(0, 14, 256, (HALF, HALF), (9, 9), 1, CPU).splits == 1


def test_serves_neighbours_of_16_bits_in_wide_blocks():
    x, core = torch.zeros(1, 256, dtype=HALF), torch.zeros(2, 128, 128)
    assert kernel.serves(x, core)
    assert not kernel.serves(x, core, 2)
    assert not kernel.serves(x.float(), core)
    assert not kernel.serves(x, core[:, :64, :64])
