"""`oftfx::rotate_product_grad`: gradients of rotations of a product whose factors were kept.

    x = a·b                      both kept by whatever made them
    y_i = rotate(x, C_i)
    dx, dC_i = rotate_product_grad(dy_i, [a, b], C_i)

A kernel makes each tile of x where it uses it, so x is never in memory again.
"""

import torch
from torch import Tensor

from oftfx.ops.define import LIBRARY, call, define, differentiate
from oftfx.ops.kept import again
from oftfx.ops.kernels import kernels, on


def rotate_product_grad(
    grads: list[Tensor], factors: list[Tensor], cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    """[`rotate_group_grad`][oftfx.ops.rotate_group_grad] of the product of several tensors.

    Args:
        grads: For each core, the gradient of what it turned the product to, (..., n·b).
        factors: Two or more, broadcast to the product's shape and multiplied in this order.
        cores: Each (n, b, b).
        need_x: Whether the gradient of the product is wanted.
        need_cores: Whether those of the cores are wanted.

    Returns:
        (..., n·b) in the product's dtype, the sum over the cores; for each core (n, b, b).
    """
    result: tuple[Tensor, list[Tensor]] = call(
        ROTATE_PRODUCT_GRAD, grads, factors, cores, need_x, need_cores
    )
    return result


def _anywhere(
    grads: list[Tensor], factors: list[Tensor], cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    fast = kernels("rotate_product", grads[0].device)
    if fast is None or not fast.fits(grads, factors, cores):
        return of_again(grads, factors, cores, need_x, need_cores)
    with on(grads[0].device):
        result: tuple[Tensor, list[Tensor]] = fast.rotate_product_grad(
            grads, factors, cores, need_x, need_cores
        )
    return result


def of_again(
    grads: list[Tensor], factors: list[Tensor], cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    """The product, and the gradients of a tensor that is in memory: what is differentiated."""
    result: tuple[Tensor, list[Tensor]] = torch.ops.oftfx.rotate_group_grad.default(
        grads, again(factors), cores, need_x, need_cores
    )
    return result


ROTATE_PRODUCT_GRAD = define(
    "rotate_product_grad(Tensor[] grads, Tensor[] factors, Tensor[] cores, bool need_x, "
    "bool need_cores) -> (Tensor, Tensor[])",
    _anywhere,
)
differentiate(ROTATE_PRODUCT_GRAD, of_again)


@torch.library.register_fake("oftfx::rotate_product_grad", lib=LIBRARY)
def _(
    grads: list[Tensor], factors: list[Tensor], cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    grad_x = grads[0].new_empty(grads[0].shape if need_x else 0)
    return grad_x, [core.new_empty(core.shape if need_cores else 0) for core in cores]
