"""The core kernels beside the float64 reference."""

import importlib
import itertools

import pytest
import torch

from oftfx import ops
from oftfx.ops.cayley_each import served

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
    assert (gram - expected).norm() < 4 * torch.finfo(dtype).eps * b**0.5 * n


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("n", "b"), [(9, 3), (3, 16), (3, 32), (2, 33)])
def test_their_gradients_lose_what_their_dtype_rounds(n, b, order, dtype, device):
    theta, grad = random_theta(n, b, device), torch.randn(n, b, b, device=device).to(dtype)
    exact = ops.cayley_grad(grad.double(), theta.double(), b, order)
    value = kernel.rounded_grad(grad, theta, b, order)
    assert value.dtype == theta.dtype
    assert error(value, exact) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", SHORT)
def test_several_rounded_have_the_bits_of_each_alone(dtype, device):
    thetas = several((3, 1, 0, 7), 16, torch.float32, device)
    cores = kernel.cayley_each(thetas, 16, 4, dtype)
    expected = [kernel.rounded(theta, 16, 4, dtype) for theta in thetas]
    assert all(map(torch.equal, cores, expected))
    assert torch.equal(kernel.cayley_joined(thetas, 16, 4, dtype), torch.cat(expected))
    grads = [torch.randn_like(core) for core in cores]
    alone = [kernel.rounded_grad(*pair, 16, 4) for pair in zip(grads, thetas, strict=True)]
    assert all(map(torch.equal, kernel.cayley_each_grad(grads, thetas, 16, 4, dtype), alone))
    # In shares, in float32, of which the sum is rounded once.
    shares = [torch.stack([grad.float() / 2] * 2) for grad in grads]
    assert all(map(torch.equal, kernel.cayley_each_grad(shares, thetas, 16, 4, dtype), alone))


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


# Blocks that fill no pack, none at all, one; as many tensors as a launch takes; one tensor.
COUNTS = [(3, 1, 0, 7), (0, 2), (1, 2, 3, 4, 5, 1, 2, 3), (5,)]


def several(
    counts: tuple[int, ...], b: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    return [random_theta(n, b, device).to(dtype) for n in counts]


@pytest.mark.parametrize(("b", "order"), [*itertools.product([2, 3, 4, 7, 16, 32], [3, 4])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
def test_several_have_the_bits_of_each_alone(counts, dtype, b, order, device):
    assert_the_same(several(counts, b, dtype, device), b, order)


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("b", [5, 31, 33, 64])
def test_several_wide_ones_and_other_orders_have_the_bits_of_each_alone(b, order, device):
    assert_the_same(several((2, 1), b, torch.float16, device), b, order)


def test_several_may_have_any_strides(device):
    thetas = [theta.T.contiguous().T for theta in several((6, 2), 4, torch.float32, device)]
    assert not thetas[0].is_contiguous()
    assert_the_same(thetas, 4, 4)
    grads = [torch.randn(4, 4, device=device).expand(n, 4, 4) for n in (6, 2)]
    found = kernel.cayley_each_grad([grads[0].double(), grads[1].bfloat16()], thetas, 4, 4)
    assert torch.equal(found[0], kernel.cayley_grad(grads[0], thetas[0], 4, 4))
    assert torch.equal(found[1], kernel.cayley_grad(grads[1].bfloat16(), thetas[1], 4, 4))


def assert_the_same(thetas: list[torch.Tensor], b: int, order: int) -> None:
    """Cores and gradients, to the bit."""
    cores = kernel.cayley_each(thetas, b, order)
    expected = [kernel.cayley(theta, b, order) for theta in thetas]
    assert all(map(torch.equal, cores, expected))
    assert torch.equal(kernel.cayley_joined(thetas, b, order), torch.cat(expected))
    grads = [torch.randn_like(core) for core in cores]
    found = kernel.cayley_each_grad(grads, thetas, b, order)
    alone = [kernel.cayley_grad(*pair, b, order) for pair in zip(grads, thetas, strict=True)]
    assert all(map(torch.equal, found, alone))
    assert [grad.dtype for grad in found] == [theta.dtype for theta in thetas]


def test_serves_up_to_eight_together(device, monkeypatch):
    module = importlib.import_module("oftfx.ops.cayley_each")
    monkeypatch.setattr(module, "kernels", lambda *_: kernel)
    thetas = several((1, 2, 3, 4, 5, 1, 2, 3), 4, torch.float32, device)
    assert served(thetas, 4, 4)
    assert not served(thetas, 4, None)
    assert not served([*thetas, thetas[0]], 4, 4)
    assert not served([thetas[0], thetas[1].bfloat16()], 4, 4)
    assert not served([thetas[0], thetas[1][0]], 4, 4)
    assert not served(several((1, 2), 65, torch.float32, device), 65, 4)
    assert not served([theta.double() for theta in thetas], 4, 4)


def as_it_is(function):
    return function


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("run", [as_it_is, compiled])
def test_the_ops_run_them(run, device, monkeypatch):
    module = importlib.import_module("oftfx.ops.cayley_each")
    monkeypatch.setattr(module, "kernels", lambda *_: kernel)
    thetas = [theta.requires_grad_() for theta in several((3, 1), 4, torch.float32, device)]
    cores = run(lambda *given: torch.ops.oftfx.cayley_each(list(given), 4, 4))(*thetas)
    grads = [torch.randn_like(core) for core in cores]
    found = torch.autograd.grad(cores, thetas, grads)
    bare = [theta.detach() for theta in thetas]
    assert all(map(torch.equal, cores, kernel.cayley_each(bare, 4, 4)))
    assert all(map(torch.equal, found, kernel.cayley_each_grad(grads, bare, 4, 4)))


def test_opcheck_of_several(device, monkeypatch):
    module = importlib.import_module("oftfx.ops.cayley_each")
    monkeypatch.setattr(module, "kernels", lambda *_: kernel)
    thetas = [theta.requires_grad_() for theta in several((3, 1), 4, torch.float32, device)]
    torch.library.opcheck(torch.ops.oftfx.cayley_each.default, (thetas, 4, 4))
    torch.library.opcheck(torch.ops.oftfx.cayley_joined.default, (thetas, 4, 4))
    grads = [torch.randn(n, 4, 4, device=device) for n in (3, 1)]
    bare = [theta.detach() for theta in thetas]
    torch.library.opcheck(torch.ops.oftfx.cayley_each_grad.default, (grads, bare, 4, 4))
