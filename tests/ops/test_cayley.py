"""`oftfx::cayley`: schema, fake, autograd and dtypes."""

import pytest
import torch

from oftfx import ops
from oftfx.rotations import cayley as maths

CAYLEY = torch.ops.oftfx.cayley.default
ORDERS = [1, 2, 3, 4, 5, 8, None]


def random_theta(n: int, b: int, dtype: torch.dtype = torch.float64, std: float = 0.1):
    return (std * torch.randn(n, b * (b - 1) // 2)).to(dtype)


@pytest.mark.parametrize("order", [1, 4, 5, None])
@pytest.mark.parametrize(
    ("n", "b", "dtype"),
    [(3, 4, torch.float64), (1, 2, torch.float32), (2, 5, torch.bfloat16), (2, 7, torch.float16)],
)
def test_opcheck(n, b, dtype, order):
    theta = random_theta(n, b, dtype).requires_grad_()
    torch.library.opcheck(CAYLEY, (theta, b, order))


def test_opcheck_on_parameters_that_are_not_contiguous():
    theta = random_theta(6, 4).T.contiguous().T.requires_grad_()
    assert not theta.is_contiguous()
    torch.library.opcheck(CAYLEY, (theta, 4, 4))


@pytest.mark.parametrize("order", ORDERS)
def test_is_the_mathematics(order):
    theta = random_theta(3, 6)
    q = maths.skew(theta, 6)
    expected = maths.exact(q) if order is None else maths.neumann(q, order)
    assert torch.equal(ops.cayley(theta, 6, order), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("b", [2, 3, 6])
def test_gradcheck(order, b):
    theta = random_theta(2, b, std=0.4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.cayley(t, b, order), theta)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6, None])
def test_gradgradcheck(order):
    theta = random_theta(2, 4, std=0.4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: ops.cayley(t, 4, order), theta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("order", [4, None])
def test_cores_keep_float32_digits_and_gradients_the_parameters_dtype(dtype, order):
    theta = random_theta(2, 8, dtype).requires_grad_()
    core = ops.cayley(theta, 8, order)
    assert core.dtype == torch.float32
    exact = ops.cayley(theta.detach().double(), 8, order)
    torch.testing.assert_close(core.double(), exact, rtol=1e-5, atol=1e-6)
    core.sum().backward()
    assert theta.grad.dtype == dtype


@pytest.mark.parametrize("order", [1, 4, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zero_parameters_give_exactly_zero(dtype, order):
    core = ops.cayley(torch.zeros(3, 10, dtype=dtype), 5, order)
    assert torch.equal(core, torch.zeros_like(core))


def test_no_blocks_give_no_cores():
    assert ops.cayley(torch.zeros(0, 6), 4, 4).shape == (0, 4, 4)


def test_runs_on_meta():
    core = ops.cayley(torch.zeros(3, 6, device="meta"), 4, 4)
    assert core.shape == (3, 4, 4)
    assert core.device.type == "meta"


@pytest.mark.parametrize("order", [4, None])
def test_autocast_does_not_reach_the_core(order):
    theta = 0.1 * torch.randn(2, 28)
    expected = ops.cayley(theta, 8, order)
    with torch.autocast("cpu", torch.bfloat16):
        core = ops.cayley(theta, 8, order)
    assert core.dtype == torch.float32
    assert torch.equal(core, expected)
