"""Gradients of a rotation of a product, a tile of which is made where it is used."""

from torch import Tensor

from oftfx.ops.triton import rotate
from oftfx.ops.triton.tiles import uniform

WIDEST = 256
"""A row of the widest block, in bytes: beside the core of a wider one, no operand more has room."""


def fits(grads: list[Tensor], factors: list[Tensor], cores: list[Tensor]) -> bool:
    """Whether the kernel takes these: one rotation, and two factors like the product itself."""
    grad, core = grads[0], cores[0]
    return (
        len(cores) == 1
        and len(factors) == 2
        and uniform(factors, grad.dtype, grad.shape)
        and core.shape[-1] * grad.dtype.itemsize <= WIDEST
        and core.shape[-1] <= rotate.largest(grad.device)
        and rotate.fits(grad, core)
    )


def rotate_product_grad(
    grads: list[Tensor], factors: list[Tensor], cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    """`oftfx::rotate_product_grad`, from one reading of the gradient and the factors."""
    (grad,), (x, by), (core,) = grads, factors, cores
    grad_x, grad_core = rotate.rotate_grad(grad, x, core, need_x, need_cores, by=by)
    return grad_x, [grad_core]
