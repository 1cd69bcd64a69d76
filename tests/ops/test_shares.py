"""Gradients of cores in shares: the whole where nothing cuts the rows into runs; and their sums."""

import pytest
import torch

from oftfx import ops
from oftfx.ops.cayley_each import CAYLEY_EACH_GRAD
from oftfx.ops.glu_rotate import GLU_ROTATE_GRAD
from oftfx.ops.norm_rotate import NORM_ROTATE_GRAD, Norm
from oftfx.ops.rotate import ROTATE_GRAD


def rotation(dtype):
    grad, x = torch.randn(2, 5, 12, dtype=dtype).unbind()
    return ROTATE_GRAD, (grad, x, torch.randn(3, 4, 4, dtype=dtype), True, True, 1)


def product(dtype):
    grad, gate, up = torch.randn(3, 5, 12, dtype=dtype).unbind()
    return GLU_ROTATE_GRAD, (grad, gate, up, torch.randn(3, 4, 4, dtype=dtype), "silu", True, True)


def norm(dtype):
    *grads, x = torch.randn(3, 5, 12, dtype=dtype).unbind()
    cores = list(torch.randn(2, 3, 4, 4, dtype=dtype).unbind())
    given = Norm(None, torch.rand(5, 1, dtype=dtype))
    return NORM_ROTATE_GRAD, (grads, x, cores, True, False, True, *given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [rotation, product, norm])
def test_a_gradient_found_as_a_whole_is_its_only_share(make, dtype):
    op, args = make(dtype)
    *others, whole = op(*args)
    *same, shares = op(*args, shares=True)
    assert all(map(torch.equal, same, others))
    if op is NORM_ROTATE_GRAD:
        (shares,), whole = shares, torch.stack(whole)
    assert shares.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(shares, whole[None])
    torch.library.opcheck(op, args, {"shares": True})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_of_parameters_adds_the_shares_of_their_cores(dtype):
    thetas = [torch.randn(3, 6, dtype=dtype) for _ in range(3)]
    grads = [torch.randn(*runs, 3, 4, 4, dtype=dtype) for runs in ((2,), (), (5,))]
    found = ops.cayley_each_grad(grads, thetas, 4, 4)
    whole = [grads[0].sum(0), grads[1], grads[2].sum(0)]
    assert all(map(torch.equal, found, ops.cayley_each_grad(whole, thetas, 4, 4)))
    torch.library.opcheck(CAYLEY_EACH_GRAD, (grads, thetas, 4, 4))


def test_shares_are_differentiated_again():
    theta = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    shares = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(shares, theta):
        return ops.cayley_each_grad([shares], [theta], 3, 4)[0]

    assert torch.autograd.gradcheck(run, (shares, theta))
