"""`oftfx::rotate`: a block-diagonal rotation of the last axis, and its gradient.

Both are opaque to autograd and the compiler. With a frozen weight behind it, the backward of
``linear(rotate(x, core), W)`` then needs x, the core and W and nothing else: the rotated copy of x
is never kept.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.define import LIBRARY, apply, call, define, differentiate
from oftfx.ops.kept import again, kept
from oftfx.ops.kernels import kernels, on
from oftfx.ops.precision import as_given
from oftfx.ops.rotate_product import ROTATE_PRODUCT_GRAD
from oftfx.ops.shares import fake, only


def rotate(x: Tensor, core: Tensor, stride: int = 1) -> Tensor:
    """``x·blockdiag(I + C_1 … I + C_n)``, in residual form.

    Args:
        x: (..., n·b), floating.
        core: (n, b, b), the residual blocks T − I; computed with in x's dtype. A single one,
            (1, b, b), rotates every block of x.
        stride: A block is two runs of b/2 coordinates, this many runs apart: 1 for neighbours.
            It must divide the number of blocks.

    Returns:
        (..., n·b) in x's dtype, contiguous.

    Raises:
        RuntimeError: The width of x is not n·b, or the stride does not fit it.
    """
    result: Tensor = call(ROTATE, x, core, stride)
    return result


def _rotate(x: Tensor, core: Tensor, stride: int) -> Tensor:
    _check(x, core, stride)
    if stride > 1:
        return _apart(rotate(_together(x, core, stride), core), core, stride)
    rotated = x.clone(memory_format=torch.contiguous_format)
    # In place, block by block of the one new tensor: large temporaries cost more than the matmuls.
    _blocks(rotated, core).baddbmm_(_blocks(x, core), core.to(x.dtype))
    return rotated


def of_aten(x: Tensor, core: Tensor, stride: int = 1) -> Tensor:
    """[`rotate`][oftfx.ops.rotate] of PyTorch's own ops, none in place: as a tracer wants it."""
    if stride > 1:
        return _apart(of_aten(_together(x, core, stride), core), core, stride)
    blocks = _blocks(x, core)
    return torch.baddbmm(blocks, blocks, core.to(x.dtype)).transpose(0, 1).reshape(x.shape)


def _rotate_anywhere(x: Tensor, core: Tensor, stride: int = 1) -> Tensor:
    _check(x, core, stride)
    fast = kernels("rotate", x.device)
    if fast is None or not fast.fits(x, core, stride):
        return _rotate(x, core, stride)
    with on(x.device):
        result: Tensor = fast.rotate(x, core, stride)
    return result


ROTATE = define("rotate(Tensor x, Tensor core, int stride=1) -> Tensor", _rotate_anywhere)


@torch.library.register_fake("oftfx::rotate", lib=LIBRARY)
def _(x: Tensor, core: Tensor, stride: int = 1) -> Tensor:
    torch._check(_fits(x, core, stride), lambda: _misfit(x, core, stride))
    return x.new_empty(x.shape)


def rotate_grad(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """Both gradients of [`rotate`][oftfx.ops.rotate]; one that is not needed comes back empty.

    Args:
        grad: (..., n·b), the gradient of the rotated x.
        x: (..., n·b), what was rotated.
        core: (n, b, b).
        need_x: Whether the gradient of x is wanted.
        need_core: Whether the gradient of the core is wanted.
        stride: As for `rotate`.

    Returns:
        (..., n·b) in x's dtype and (n, b, b) in the core's.
    """
    result: tuple[Tensor, Tensor] = call(ROTATE_GRAD, grad, x, core, need_x, need_core, stride)
    return result


@as_given
def _rotate_grad(
    grad: Tensor,
    x: Tensor,
    core: Tensor,
    need_x: bool,
    need_core: bool,
    stride: int = 1,
    shares: bool = False,
) -> tuple[Tensor, Tensor]:
    # Below an op nothing is recorded for autograd; above it, this is the op's own derivative.
    grad_x = rotate(grad, core.mT, stride) if need_x else grad.new_empty(0)
    grad_core = block_gram(x, grad, core, stride) if need_core else core.new_empty(0)
    return grad_x, only(grad_core) if shares else grad_core


def _kernels(x: Tensor, core: Tensor, stride: int, shares: bool) -> Any:
    fast: Any = kernels("rotate", x.device)
    if fast is None or not fast.fits(x, core, stride) or (shares and not hasattr(fast, "shares")):
        return None
    return fast


def _rotate_grad_anywhere(
    grad: Tensor,
    x: Tensor,
    core: Tensor,
    need_x: bool,
    need_core: bool,
    stride: int = 1,
    shares: bool = False,
) -> tuple[Tensor, Tensor]:
    fast = _kernels(x, core, stride, shares)
    if fast is None:
        return _rotate_grad(grad, x, core, need_x, need_core, stride, shares)
    grad = grad if grad.dtype is x.dtype else grad.to(x.dtype)  # which kernels take for granted
    run = fast.shares if shares else fast.rotate_grad
    with on(x.device):
        result: tuple[Tensor, Tensor] = run(grad, x, core, need_x, need_core, stride)
    return result


ROTATE_GRAD = define(
    "rotate_grad(Tensor grad, Tensor x, Tensor core, bool need_x, bool need_core, int stride=1, "
    "bool shares=False) -> (Tensor, Tensor)",
    _rotate_grad_anywhere,
)
"""[`rotate_grad`][oftfx.ops.rotate_grad], of a core that needs it in `oftfx.ops.shares` too."""


@torch.library.register_fake("oftfx::rotate_grad", lib=LIBRARY)
def _(
    grad: Tensor,
    x: Tensor,
    core: Tensor,
    need_x: bool,
    need_core: bool,
    stride: int = 1,
    shares: bool = False,
) -> tuple[Tensor, Tensor]:
    grad_x = grad.new_empty(x.shape if need_x else 0)
    if shares:
        fast = _kernels(x, core, stride, shares)
        return grad_x, fake(fast.runs(grad, x, core, need_x, stride) if fast else 1, core)
    return grad_x, core.new_empty(core.shape if need_core else 0)


def block_gram(x: Tensor, y: Tensor, like: Tensor, stride: int = 1) -> Tensor:
    """``x_iᵀ y_i`` per block of the last axis over all rows, shaped and typed as ``like``."""
    if stride > 1:
        x, y = _together(x, like, stride), _together(y, like, stride)
    return torch.bmm(_blocks(x, like).mT, _blocks(y, like)).to(like.dtype)


def _fits(x: Tensor, core: Tensor, stride: int) -> bool:
    n, b, c = core.shape
    width = x.shape[-1]
    if b != c or (width != n * b and (n != 1 or width % b)):
        return False
    return stride == 1 or (stride > 1 and b % 2 == 0 and width % (stride * b) == 0)


def _misfit(x: Tensor, core: Tensor, stride: int) -> str:
    n, b, _ = core.shape
    return (
        f"oftfx::rotate: x of shape {tuple(x.shape)} does not fit a core of shape "
        f"{tuple(core.shape)} and stride={stride}: the last axis must be {n}·{b}, the stride must "
        "divide the number of blocks, and beyond 1 their width must be even."
    )


def _check(x: Tensor, core: Tensor, stride: int) -> None:
    """In every launch's way, so without `torch._check`, which costs more than a launch."""
    if not _fits(x, core, stride):
        raise RuntimeError(_misfit(x, core, stride))


def _together(x: Tensor, core: Tensor, stride: int) -> Tensor:
    """Moves the two halves of every block side by side, a stride of them at a time."""
    halves = x.reshape(*x.shape[:-1], _groups(x, core, stride), 2, stride, core.shape[-1] // 2)
    return halves.transpose(-3, -2).reshape(x.shape)


def _apart(x: Tensor, core: Tensor, stride: int) -> Tensor:
    """Undoes `_together`."""
    halves = x.reshape(*x.shape[:-1], _groups(x, core, stride), stride, 2, core.shape[-1] // 2)
    return halves.transpose(-3, -2).reshape(x.shape)


def _groups(x: Tensor, core: Tensor, stride: int) -> int:
    """How many runs of so many blocks there are; said, since of no rows nobody could tell."""
    return x.shape[-1] // (stride * core.shape[-1])


def _blocks(x: Tensor, core: Tensor) -> Tensor:
    """Reads x (..., n·b) as (n, rows, b), a view where x allows one."""
    n, b, _ = core.shape
    return x.reshape(-1, n, b).transpose(0, 1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, core: Tensor, stride: int = 1) -> Tensor:
        ctx.save_for_backward(core, *kept(x))
        ctx.stride = stride
        result: Tensor = call(ROTATE, x, core, stride)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        core, *saved = ctx.saved_tensors
        need_x, need_core = ctx.needs_input_grad[:2]
        if len(saved) == 1 or ctx.stride > 1:
            grad_x, grad_core = rotate_grad(grad, again(saved), core, need_x, need_core, ctx.stride)
        else:
            grad_x, (grad_core,) = call(
                ROTATE_PRODUCT_GRAD, [grad], saved, [core], need_x, need_core
            )
        return grad_x if need_x else None, grad_core if need_core else None, None


differentiate(ROTATE, partial(apply, _Rotate))
differentiate(ROTATE_GRAD, _rotate_grad)
