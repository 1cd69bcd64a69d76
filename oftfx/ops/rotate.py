"""`oftfx::rotate`: a block-diagonal rotation of the last axis, and its gradient.

Both are opaque to autograd and the compiler. With a frozen weight behind it, the backward of
``linear(rotate(x, core), W)`` then needs x, the core and W and nothing else: the rotated copy of x
is never kept.
"""

from typing import Any

import torch
from torch import Tensor

from oftfx.ops.triton import kernels


@torch.library.custom_op("oftfx::rotate", mutates_args=())
def rotate(x: Tensor, core: Tensor) -> Tensor:
    """``x·blockdiag(I + C_1 … I + C_n)``, in residual form.

    Args:
        x: (..., n·b), floating.
        core: (n, b, b), the residual blocks T − I; computed with in x's dtype.

    Returns:
        (..., n·b) in x's dtype, contiguous.

    Raises:
        RuntimeError: The width of x is not n·b.
    """
    return _rotate(x, core)


def _rotate(x: Tensor, core: Tensor) -> Tensor:
    _check(x, core)
    rotated = x.clone(memory_format=torch.contiguous_format)
    # In place, block by block of the one new tensor: large temporaries cost more than the matmuls.
    _blocks(rotated, core).baddbmm_(_blocks(x, core), core.to(x.dtype))
    return rotated


@torch.library.impl("oftfx::rotate", "cuda")
def _(x: Tensor, core: Tensor) -> Tensor:
    _check(x, core)
    fast = kernels("rotate", x.device)
    if fast is None or not fast.fits(x, core):
        return _rotate(x, core)
    with torch.cuda.device_of(x):
        return fast.rotate(x, core)


@rotate.register_fake
def _(x: Tensor, core: Tensor) -> Tensor:
    _check(x, core)
    return x.new_empty(x.shape)


@torch.library.custom_op("oftfx::rotate_grad", mutates_args=())
def rotate_grad(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool
) -> tuple[Tensor, Tensor]:
    """Both gradients of [`rotate`][oftfx.ops.rotate]; one that is not needed comes back empty.

    Args:
        grad: (..., n·b), the gradient of the rotated x.
        x: (..., n·b), what was rotated.
        core: (n, b, b).
        need_x: Whether the gradient of x is wanted.
        need_core: Whether the gradient of the core is wanted.

    Returns:
        (..., n·b) in x's dtype and (n, b, b) in the core's.
    """
    return _rotate_grad(grad, x, core, need_x, need_core)


def _rotate_grad(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool
) -> tuple[Tensor, Tensor]:
    # `rotate` here is an eager kernel within a kernel: no autograd is recorded below an op.
    grad_x = rotate(grad, core.mT) if need_x else grad.new_empty(0)
    grad_core = block_gram(x, grad, core) if need_core else core.new_empty(0)
    return grad_x, grad_core


@torch.library.impl("oftfx::rotate_grad", "cuda")
def _(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool
) -> tuple[Tensor, Tensor]:
    fast = kernels("rotate", x.device)
    if fast is None or not fast.fits(x, core):
        return _rotate_grad(grad, x, core, need_x, need_core)
    with torch.cuda.device_of(x):
        return fast.rotate_grad(grad, x, core, need_x, need_core)


@rotate_grad.register_fake
def _(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(x.shape if need_x else 0), core.new_empty(core.shape if need_core else 0)


def block_gram(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """``x_iᵀ y_i`` per block of the last axis over all rows, shaped and typed as ``like``."""
    return torch.bmm(_blocks(x, like).mT, _blocks(y, like)).to(like.dtype)


def _check(x: Tensor, core: Tensor) -> None:
    n, b, c = core.shape
    torch._check(
        b == c and x.shape[-1] == n * b,
        lambda: (
            f"oftfx::rotate: x of shape {tuple(x.shape)} does not fit a core of shape "
            f"{tuple(core.shape)}: the last axis must be {n}·{b}."
        ),
    )


def _blocks(x: Tensor, core: Tensor) -> Tensor:
    """Reads x (..., n·b) as (n, rows, b), a view where x allows one."""
    _check(x, core)
    n, b, _ = core.shape
    return x.reshape(-1, n, b).transpose(0, 1)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _rotate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, core = ctx.saved_tensors
    need_x, need_core = ctx.needs_input_grad
    grad_x, grad_core = rotate_grad(grad, x, core, need_x, need_core)
    return grad_x if need_x else None, grad_core if need_core else None


def _save_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, x, core, ctx.need_x, ctx.need_core = inputs
    ctx.save_for_backward(grad, x, core)


def _rotate_grad_backward(
    ctx: Any, grad_x: Tensor, grad_core: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    """Second order: both results are bilinear, so their derivatives are rotations and Grams."""
    grad, x, core = ctx.saved_tensors
    d_grad = torch.zeros_like(grad)
    d_x = d_core = None
    if ctx.need_x:  # grad_x = grad + grad·Cᵀ
        d_grad = rotate(grad_x, core)
        d_core = block_gram(grad_x, grad, core)
    if ctx.need_core:  # grad_core = xᵀ·grad
        d_grad = d_grad + rotate(x, grad_core) - x
        d_x = rotate(grad, grad_core.mT) - grad
    return d_grad, d_x, d_core, None, None


rotate.register_autograd(_rotate_backward, setup_context=_save)
rotate_grad.register_autograd(_rotate_grad_backward, setup_context=_save_grad)
