"""Gradients of rotations of a product, a tile of which is made where it is used."""

from torch import Tensor

from oftfx.ops.native import rotate_group
from oftfx.ops.native.rotate_group import FACTORS


def fits(grads: list[Tensor], factors: list[Tensor], cores: list[Tensor]) -> bool:
    """Whether the kernels take these: one of the first two factors has the product's own shape."""
    x = grads[0]
    n, b, _ = cores[0].shape
    return (
        rotate_group.fits(x, cores, grads)
        and x.shape[-1] == n * b
        and len(factors) <= FACTORS
        and all(factor.dtype == x.dtype for factor in factors)
        and any(factor.shape == x.shape and factor.is_contiguous() for factor in factors[:2])
    )


def rotate_product_grad(
    grads: list[Tensor], factors: list[Tensor], cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    """`oftfx::rotate_product_grad`, from one reading of the gradients and the factors."""
    shape = grads[0].shape
    first, second, *others = factors
    if first.shape != shape or not first.is_contiguous():
        first, second = second, first  # whose product is the same, to the bit
    others = [_matrix(factor, shape) for factor in (second, *others)]
    return rotate_group.rotate_group_grad(grads, first, cores, need_x, need_cores, others)


def _matrix(factor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Broadcast to a matrix, its columns next to each other or all the same."""
    matrix = factor.expand(shape).reshape(-1, shape[-1])
    return matrix if matrix.stride(1) in (0, 1) else matrix.contiguous()
