"""`oftfx::rotate_product_grad`: gradients of rotating a product that need not be in memory."""

import math

import pytest
import torch
from torch import Tensor

from oftfx import ops
from oftfx.ops.kernels import kernels

PRODUCT_GRAD = torch.ops.oftfx.rotate_product_grad.default
GATED, NORM, SWAPPED = "gated", "norm", "swapped"


def case(kind: str, shape=(2, 5, 32), b: int = 16, count: int = 2, dtype=torch.float32):
    """Gradients, factors and cores."""
    torch.manual_seed(0)
    matrix, other = (torch.randn(shape, dtype=dtype) for _ in range(2))
    row, column = torch.rand(*shape[:-1], 1, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    known = {GATED: [matrix, other], NORM: [matrix, row, column], SWAPPED: [column, other, row]}
    cores = [0.2 * torch.randn(shape[-1] // b, b, b, dtype=dtype) for _ in range(count)]
    return [torch.randn(shape, dtype=dtype) for _ in cores], known[kind], cores


def expected(grads: list[Tensor], factors: list[Tensor], cores: list[Tensor]):
    return ops.rotate_group_grad(grads, math.prod(factors[1:], start=factors[0]), cores, True, True)


@pytest.mark.parametrize("kind", [GATED, NORM, SWAPPED])
@pytest.mark.parametrize(("shape", "b"), [((2, 37, 96), 32), ((1, 64), 16), ((300, 64), 64)])
def test_has_the_bits_of_making_the_product_first(kind, shape, b):
    given = case(kind, shape, b)
    grad_x, grad_cores = ops.rotate_product_grad(*given, True, True)
    grad, grads = expected(*given)
    assert torch.equal(grad_x, grad)
    assert all(map(torch.equal, grad_cores, grads))


def test_the_native_kernels_make_it_themselves(monkeypatch):
    fast = kernels("rotate_product", torch.device("cpu"))
    if fast is None:
        pytest.skip("no C compiler")
    given = case(NORM)
    assert fast.fits(*given)
    monkeypatch.setattr("oftfx.ops.rotate_product.again", lambda factors: pytest.fail("was made"))
    ops.rotate_product_grad(*given, True, True)


@pytest.mark.parametrize("kind", [GATED, NORM])
@pytest.mark.parametrize(
    ("dtype", "b"), [(torch.float64, 16), (torch.bfloat16, 16), (torch.float32, 8)]
)
def test_is_right_where_no_kernel_serves(kind, dtype, b):
    given = case(kind, b=b, dtype=dtype)
    torch.testing.assert_close(ops.rotate_product_grad(*given, True, True), expected(*given))


@pytest.mark.parametrize(("need_x", "need_cores"), [(True, False), (False, True)])
def test_only_what_is_wanted_is_computed(need_x, need_cores):
    given = case(GATED)
    grad_x, grad_cores = ops.rotate_product_grad(*given, need_x, need_cores)
    grad, grads = expected(*given)
    assert torch.equal(grad_x, grad) if need_x else not grad_x.numel()
    for got, wanted in zip(grad_cores, grads, strict=True):
        assert torch.equal(got, wanted) if need_cores else not got.numel()


def test_opcheck():
    grads, factors, cores = case(NORM, (3, 32))
    for tensor in (*grads, *factors, *cores):
        tensor.requires_grad_()
    torch.library.opcheck(PRODUCT_GRAD, (grads, factors, cores, True, True))


def test_second_order_is_that_of_the_product():
    def second(op):
        grads, factors, cores = case(NORM, (3, 8), 4, dtype=torch.float64)
        leaves = [tensor.requires_grad_() for tensor in (*grads, *factors, *cores)]
        grad_x, grad_cores = op(grads, factors, cores)
        total = sum(each.sin().sum() for each in (grad_x, *grad_cores))
        return torch.autograd.grad(total, leaves)

    got = second(lambda *given: ops.rotate_product_grad(*given, True, True))
    torch.testing.assert_close(got, second(expected))
