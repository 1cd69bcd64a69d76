"""`oftfx::rotate_group`: several rotations of one tensor, which is read once.

What q, k and v (or gate and up) do to the tensor they share: each turns it by a core of its own.
The gradients meet here as well, so that their sum is never a pass of its own.
"""

from typing import Any

import torch
from torch import Tensor

from oftfx.ops.define import LIBRARY, apply, call, define, differentiate
from oftfx.ops.kept import kept
from oftfx.ops.kernels import kernels, on
from oftfx.ops.rotate import rotate, rotate_grad
from oftfx.ops.rotate_product import ROTATE_PRODUCT_GRAD


def rotate_group(x: Tensor, cores: list[Tensor]) -> list[Tensor]:
    """[`rotate`][oftfx.ops.rotate] of one x by each of several cores.

    Args:
        x: (..., n·b), floating.
        cores: Each (n, b, b), of one shape.

    Returns:
        For each core, (..., n·b) in x's dtype, contiguous.

    Raises:
        RuntimeError: The width of x is not n·b.
    """
    result: list[Tensor] = call(ROTATE_GROUP, x, cores)
    return result


def _rotate_group(x: Tensor, cores: list[Tensor]) -> list[Tensor]:
    fast = kernels("rotate_group", x.device)
    if fast is None or not fast.fits(x, cores):
        return [rotate(x, core) for core in cores]
    with on(x.device):
        result: list[Tensor] = fast.rotate_group(x, cores)
    return result


ROTATE_GROUP = define("rotate_group(Tensor x, Tensor[] cores) -> Tensor[]", _rotate_group)


@torch.library.register_fake("oftfx::rotate_group", lib=LIBRARY)
def _(x: Tensor, cores: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for _ in cores]


def rotate_group_grad(
    grads: list[Tensor], x: Tensor, cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of [`rotate_group`][oftfx.ops.rotate_group]; what is not needed comes back empty.

    Args:
        grads: For each core, the gradient of what it turned x to, (..., n·b).
        x: (..., n·b), what was rotated.
        cores: Each (n, b, b).
        need_x: Whether the gradient of x is wanted.
        need_cores: Whether those of the cores are wanted.

    Returns:
        (..., n·b) in x's dtype, the sum over the cores; and for each core (n, b, b) in its dtype.
    """
    result: tuple[Tensor, list[Tensor]] = call(
        ROTATE_GROUP_GRAD, grads, x, cores, need_x, need_cores
    )
    return result


def _one_by_one(
    grads: list[Tensor], x: Tensor, cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    grad_x, grad_core = rotate_grad(grads[0], x, cores[0], need_x, need_cores)
    grad_cores = [grad_core]
    for grad, core in zip(grads[1:], cores[1:], strict=True):
        more, grad_core = rotate_grad(grad, x, core, need_x, need_cores)
        grad_x += more
        grad_cores.append(grad_core)
    return grad_x, grad_cores


def _rotate_group_grad(
    grads: list[Tensor], x: Tensor, cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    fast = kernels("rotate_group", x.device)
    if fast is None or not fast.fits(x, cores, grads):
        return _one_by_one(grads, x, cores, need_x, need_cores)
    with on(x.device):
        result: tuple[Tensor, list[Tensor]] = fast.rotate_group_grad(
            grads, x, cores, need_x, need_cores
        )
    return result


ROTATE_GROUP_GRAD = define(
    "rotate_group_grad(Tensor[] grads, Tensor x, Tensor[] cores, bool need_x, bool need_cores) "
    "-> (Tensor, Tensor[])",
    _rotate_group_grad,
)


@torch.library.register_fake("oftfx::rotate_group_grad", lib=LIBRARY)
def _(
    grads: list[Tensor], x: Tensor, cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    grad_x = x.new_empty(x.shape if need_x else 0)
    return grad_x, [core.new_empty(core.shape if need_cores else 0) for core in cores]


class _RotateGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *cores: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*cores, *kept(x))
        return tuple(call(ROTATE_GROUP, x, list(cores)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        need_x, *need_cores = ctx.needs_input_grad
        tensors = list(ctx.saved_tensors)
        cores, saved = tensors[: len(need_cores)], tensors[len(need_cores) :]
        if len(saved) == 1:
            grads_of, x = ROTATE_GROUP_GRAD, saved[0]
        else:
            grads_of, x = ROTATE_PRODUCT_GRAD, saved
        grad_x, grad_cores = call(grads_of, list(grads), x, cores, need_x, any(need_cores))
        needed = zip(grad_cores, need_cores, strict=True)
        return grad_x if need_x else None, *(grad if need else None for grad, need in needed)


def _apply(x: Tensor, cores: list[Tensor]) -> list[Tensor]:
    return list(apply(_RotateGroup, x, *cores))


differentiate(ROTATE_GROUP, _apply)
differentiate(ROTATE_GROUP_GRAD, _one_by_one)
