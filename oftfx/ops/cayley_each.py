"""`oftfx::cayley_each`: the cores of several sites at once, none copied beside the others.

    before                                    after
    C = cayley(stack(theta_1 … theta_n))      C_1 … C_n = cayley_each(theta_1 … theta_n)
    C_1 … C_n = unbind(C)

On a CPU, where each copy takes memory anew from the system, page by page.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.cayley import cayley, cayley_grad
from oftfx.ops.define import LIBRARY, call, define, differentiate
from oftfx.ops.kernels import kernels


def cayley_each(thetas: list[Tensor], block_size: int, order: int) -> list[Tensor]:
    """[`cayley`][oftfx.ops.cayley] of each of several parameters.

    Args:
        thetas: Each (n, b(b−1)/2), of one shape, dtype and device.
        block_size: b.
        order: k of the Cayley–Neumann series.

    Returns:
        For each (n, b, b), float32 at least.
    """
    result: list[Tensor] = call(CAYLEY_EACH, thetas, block_size, order)
    return result


def served(thetas: Sequence[Tensor], block_size: int, order: int | None) -> bool:
    """Whether a kernel takes the parameters where they are; else a stack of them is as good."""
    first = thetas[0]
    if first.device.type != "cpu":
        return False
    fast = kernels("cayley", first.device)
    return fast is not None and bool(fast.fits(first, block_size, order))


def _cayley_each(thetas: list[Tensor], block_size: int, order: int) -> list[Tensor]:
    if not served(thetas, block_size, order):
        return [cayley(theta, block_size, order) for theta in thetas]
    fast: Any = kernels("cayley", thetas[0].device)
    result: list[Tensor] = fast.cayley_each(thetas, block_size, order)
    return result


CAYLEY_EACH = define(
    "cayley_each(Tensor[] thetas, int block_size, int order) -> Tensor[]", _cayley_each
)


@torch.library.register_fake("oftfx::cayley_each", lib=LIBRARY)
def _(thetas: list[Tensor], block_size: int, order: int) -> list[Tensor]:
    wide = torch.promote_types(thetas[0].dtype, torch.float32)
    shape = *thetas[0].shape[:-1], block_size, block_size
    return [theta.new_empty(shape, dtype=wide) for theta in thetas]


def cayley_each_grad(
    grads: list[Tensor], thetas: list[Tensor], block_size: int, order: int
) -> list[Tensor]:
    """Gradients of [`cayley_each`][oftfx.ops.cayley_each]: each (n, b, b) to theta's shape."""
    result: list[Tensor] = call(CAYLEY_EACH_GRAD, grads, thetas, block_size, order)
    return result


def _cayley_each_grad(
    grads: list[Tensor], thetas: list[Tensor], block_size: int, order: int
) -> list[Tensor]:
    if not served(thetas, block_size, order):
        return of_each(grads, thetas, block_size, order)
    fast: Any = kernels("cayley", thetas[0].device)
    result: list[Tensor] = fast.cayley_each_grad(grads, thetas, block_size, order)
    return result


def of_each(grads: list[Tensor], thetas: list[Tensor], block_size: int, order: int) -> list[Tensor]:
    """Each gradient by itself: what is differentiated again."""
    pairs = zip(grads, thetas, strict=True)
    return [cayley_grad(grad, theta, block_size, order) for grad, theta in pairs]


CAYLEY_EACH_GRAD = define(
    "cayley_each_grad(Tensor[] grads, Tensor[] thetas, int block_size, int order) -> Tensor[]",
    _cayley_each_grad,
)


@torch.library.register_fake("oftfx::cayley_each_grad", lib=LIBRARY)
def _(grads: list[Tensor], thetas: list[Tensor], block_size: int, order: int) -> list[Tensor]:
    return [theta.new_empty(theta.shape) for theta in thetas]


class _CayleyEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block_size: int, order: int, *thetas: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*thetas)
        ctx.block_size, ctx.order = block_size, order
        return tuple(call(CAYLEY_EACH, list(thetas), block_size, order))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        thetas = list(ctx.saved_tensors)
        return None, None, *cayley_each_grad(list(grads), thetas, ctx.block_size, ctx.order)


def _apply(thetas: list[Tensor], block_size: int, order: int) -> list[Tensor]:
    return list(_CayleyEach.apply(block_size, order, *thetas))


differentiate(CAYLEY_EACH, _apply)
differentiate(CAYLEY_EACH_GRAD, of_each)
