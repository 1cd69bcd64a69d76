"""Gradients of rotations of a product, a tile of which is made where it is used."""

from torch import Tensor

from oftfx.ops.native import rotate_group
from oftfx.ops.native.rotate_group import FACTORS, Strided


def fits(grads: list[Tensor], factors: list[Tensor], cores: list[Tensor]) -> bool:
    """Whether the kernels take these: one of the first two factors has the product's own shape."""
    x = grads[0]
    n, b, _ = cores[0].shape
    shape, dtype = x.shape, x.dtype
    if not rotate_group.fits(x, cores, grads) or shape[-1] != n * b or len(factors) > FACTORS:
        return False
    for factor in factors:
        if factor.dtype is not dtype:
            return False
    return _whole(factors[0], shape) or _whole(factors[1], shape)


def rotate_product_grad(
    grads: list[Tensor], factors: list[Tensor], cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    """`oftfx::rotate_product_grad`, from one reading of the gradients and the factors."""
    shape = grads[0].shape
    first, *others = factors
    if not _whole(first, shape):
        others[0], first = first, others[0]  # whose product is the same, to the bit
    held = [_matrix(factor, shape) for factor in others]
    strided: list[Strided] = [(factor.data_ptr(), *steps) for factor, steps in held]
    return rotate_group.rotate_group_grad(grads, first, cores, need_x, need_cores, strided)


def _whole(factor: Tensor, shape: tuple[int, ...]) -> bool:
    return factor.shape == shape and factor.is_contiguous()


def _matrix(factor: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, int]]:
    """What to read as a matrix of the last axis, broadcast, with its steps; a copy at worst."""
    own = factor.shape
    if factor.is_contiguous():
        if own == shape:
            return factor, (shape[-1], 1)
        if own == shape[-1:]:
            return factor, (0, 1)
        if own == (*shape[:-1], 1):
            return factor, (1, 0)
    whole = factor.expand(shape).contiguous()
    return whole, (shape[-1], 1)
