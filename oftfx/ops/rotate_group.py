"""`oftfx::rotate_group`: several rotations of one tensor, which is read once.

What q, k and v (or gate and up) do to the tensor they share: each turns it by a core of its own.
The gradients meet here as well, so that their sum is never a pass of its own.
"""

from typing import Any

import torch
from torch import Tensor

from oftfx.ops.rotate import block_gram, rotate, rotate_grad
from oftfx.ops.triton import kernels


@torch.library.custom_op("oftfx::rotate_group", mutates_args=())
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
    return [rotate(x, core) for core in cores]


@torch.library.impl("oftfx::rotate_group", ("cpu", "cuda"))
def _(x: Tensor, cores: list[Tensor]) -> list[Tensor]:
    fast = kernels("rotate_group", x.device)
    if fast is None or not fast.fits(x, cores):
        return [rotate(x, core) for core in cores]
    with torch.cuda.device_of(x):
        return fast.rotate_group(x, cores)


@rotate_group.register_fake
def _(x: Tensor, cores: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for _ in cores]


@torch.library.custom_op("oftfx::rotate_group_grad", mutates_args=())
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
    return _one_by_one(grads, x, cores, need_x, need_cores)


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


@torch.library.impl("oftfx::rotate_group_grad", ("cpu", "cuda"))
def _(
    grads: list[Tensor], x: Tensor, cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    fast = kernels("rotate_group", x.device)
    if fast is None or not fast.fits(x, cores, grads):
        return _one_by_one(grads, x, cores, need_x, need_cores)
    with torch.cuda.device_of(x):
        return fast.rotate_group_grad(grads, x, cores, need_x, need_cores)


@rotate_group_grad.register_fake
def _(
    grads: list[Tensor], x: Tensor, cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    grad_x = x.new_empty(x.shape if need_x else 0)
    return grad_x, [core.new_empty(core.shape if need_cores else 0) for core in cores]


def _save(ctx: Any, inputs: tuple[Tensor, list[Tensor]], output: list[Tensor]) -> None:
    x, cores = inputs
    ctx.save_for_backward(x, *cores)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, Any]:
    x, *cores = ctx.saved_tensors
    need_x, need_cores = ctx.needs_input_grad
    need_cores = any(need_cores) if isinstance(need_cores, (list, tuple)) else need_cores
    given = [torch.zeros_like(x) if grad is None else grad for grad in grads]  # one went unread
    grad_x, grad_cores = rotate_group_grad(given, x, cores, need_x, need_cores)
    return grad_x if need_x else None, grad_cores if need_cores else [None] * len(cores)


def _save_grad(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grads, x, cores, ctx.need_x, ctx.need_cores = inputs
    ctx.save_for_backward(x, *grads, *cores)


def _grad_backward(ctx: Any, grad_x: Tensor, grad_cores: list[Tensor]) -> tuple[Any, ...]:
    """Second order, by differentiating the sum of what each core alone would give."""
    leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
    x, *rest = leaves
    grads, cores = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        for i, (grad, core) in enumerate(zip(grads, cores, strict=True)):
            if ctx.need_x:
                total = total + (rotate(grad, core.mT) * grad_x).sum()
            if ctx.need_cores:
                total = total + (block_gram(x, grad, core) * grad_cores[i]).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return list(found[1 : 1 + len(grads)]), found[0], list(found[1 + len(grads) :]), None, None


rotate_group.register_autograd(_backward, setup_context=_save)
rotate_group_grad.register_autograd(_grad_backward, setup_context=_save_grad)
