"""`oftfx::rotated_linear`: a rotation and the 4-bit matmul behind it, and their gradient.

    y = (x·M) Wᵀ + bias = x W̃ᵀ + bias,    W̃ = W Mᵀ

Dequantising W makes a float copy of it anyway, in the forward and again in the backward; a copy
that is rotated on the way costs no pass over the activations. Nothing is kept but x, or the factors
that it is the product of, the core and the bytes of W.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oftfx.ops import packed
from oftfx.ops.cost import folds_packed
from oftfx.ops.define import LIBRARY, apply, call, define, differentiate
from oftfx.ops.fold import core_grad, fits, kept_grad, misfit
from oftfx.ops.frozen_linear import times
from oftfx.ops.kept import kept
from oftfx.ops.kernels import kernels, on
from oftfx.ops.linear import linear
from oftfx.ops.packed import Packed
from oftfx.ops.precision import as_given, exactly
from oftfx.ops.rotate import rotate
from oftfx.ops.rotate_group import rotate_group_grad

PACKED = (
    "Tensor data, Tensor absmax, Tensor code, int[] shape, int block_size, "
    "Tensor? nested_absmax=None, Tensor? nested_code=None, Tensor? offset=None, "
    "int nested_block_size=256"
)
"""The fields of [`Packed`][oftfx.ops.packed.Packed], as a schema has them."""


def rotated_linear(x: Tensor, core: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """``(x·blockdiag(I + C_1 … I + C_n)) Wᵀ + bias``.

    Args:
        x: (..., n·b), floating.
        core: (n, b, b), the residual blocks; computed with in x's dtype. A single one, (1, b, b),
            rotates every block of x.
        weight: W, (out, n·b).
        bias: (out,), in x's dtype.

    Returns:
        (..., out) in x's dtype.

    Raises:
        RuntimeError: The width of x is not n·b, or not that of W.
    """
    result: Tensor = call(ROTATED_LINEAR, x, core, bias, *weight)
    return result


def folded(weight: Packed, core: Tensor, dtype: torch.dtype) -> Tensor:
    """``W blockdiag(I + C_1 … I + C_n)ᵀ``, (out, n·b), in this dtype."""
    fast = kernels("dequantise", weight.data.device)
    n, b, _ = core.shape
    if fast is None or n * b != weight.shape[1] or not fast.fits(weight, b, dtype):
        return rotate(dequantised(weight, dtype), core.mT)
    with on(weight.data.device):
        result: Tensor = fast.folded(weight, core, dtype)
    return result


def dequantised(weight: Packed, dtype: torch.dtype) -> Tensor:
    """W, (out, in), in this dtype."""
    fast = kernels("dequantise", weight.data.device)
    if fast is None or not fast.fits(weight, None, dtype):
        return packed.dequantised(weight, dtype)
    with on(weight.data.device):
        result: Tensor = fast.dequantised(weight, dtype)
    return result


@as_given
def _rotated_linear(x: Tensor, core: Tensor, bias: Tensor | None, *stored: Any) -> Tensor:
    weight = Packed(*stored)
    if not fits(x, core, weight.shape):
        raise RuntimeError(misfit("rotated_linear", x, core, weight.shape))
    if _folds(x, core, weight):
        return linear(x, folded(weight, core, x.dtype), bias)
    return linear(rotate(x, core), dequantised(weight, x.dtype), bias)


ROTATED_LINEAR = define(
    f"rotated_linear(Tensor x, Tensor core, Tensor? bias, {PACKED}) -> Tensor", _rotated_linear
)


@torch.library.register_fake("oftfx::rotated_linear", lib=LIBRARY)
def _(x: Tensor, core: Tensor, bias: Tensor | None, *stored: Any) -> Tensor:
    shape = Packed(*stored).shape
    torch._check(fits(x, core, shape), lambda: misfit("rotated_linear", x, core, shape))
    return x.new_empty(*x.shape[:-1], shape[0])


def rotated_linear_grad(
    grad: Tensor,
    factors: list[Tensor],
    core: Tensor,
    need_x: bool,
    need_core: bool,
    weight: Packed,
) -> tuple[Tensor, Tensor]:
    """Both gradients of [`rotated_linear`][oftfx.ops.rotated_linear]; empty where not needed.

    Args:
        grad: (..., out), the gradient of the result.
        factors: What was rotated, x, (..., n·b); or two or more tensors of its dtype, broadcast to
            its shape and multiplied in this order.
        core: (n, b, b).
        need_x: Whether the gradient of x is wanted.
        need_core: Whether the gradient of the core is wanted.
        weight: W, (out, n·b).

    Returns:
        (..., n·b) in x's dtype and (n, b, b) in the core's.
    """
    result: tuple[Tensor, Tensor] = call(
        ROTATED_LINEAR_GRAD, grad, factors, core, need_x, need_core, *weight
    )
    return result


@as_given
def _rotated_linear_grad(
    grad: Tensor, factors: list[Tensor], core: Tensor, need_x: bool, need_core: bool, *stored: Any
) -> tuple[Tensor, Tensor]:
    weight = Packed(*stored)
    if not _folds(grad, core, weight):
        return _in_turn(grad, factors, core, need_x, need_core, *stored)
    x, *by = factors
    grad_x = times(grad, folded(weight, core, x.dtype))
    grad_core = core_grad(grad_x, x, core, by) if need_core else core.new_empty(0)
    return grad_x if need_x else grad.new_empty(0), grad_core


ROTATED_LINEAR_GRAD = define(
    "rotated_linear_grad(Tensor grad, Tensor[] factors, Tensor core, bool need_x, bool need_core, "
    f"{PACKED}) -> (Tensor, Tensor)",
    _rotated_linear_grad,
)


@torch.library.register_fake("oftfx::rotated_linear_grad", lib=LIBRARY)
def _(
    grad: Tensor, factors: list[Tensor], core: Tensor, need_x: bool, need_core: bool, *stored: Any
) -> tuple[Tensor, Tensor]:
    shape = (*grad.shape[:-1], Packed(*stored).shape[1])
    return grad.new_empty(shape if need_x else 0), core.new_empty(core.shape if need_core else 0)


@as_given
def _in_turn(
    grad: Tensor, factors: list[Tensor], core: Tensor, need_x: bool, need_core: bool, *stored: Any
) -> tuple[Tensor, Tensor]:
    """The matmul's gradient, then the rotation's."""
    inner = times(grad, dequantised(Packed(*stored), factors[0].dtype))
    return kept_grad(inner, factors, core, need_x, need_core)


def _folds(rows: Tensor, core: Tensor, weight: Packed) -> bool:
    """Whether to turn the weight and not x, whose rows these are, or those of its product."""
    return folds_packed(rows.shape[:-1].numel(), weight.shape[0], core.shape[-1], rows.device)


def defer(x: Tensor, cores: list[Tensor]) -> tuple[Tensor, ...]:
    """What [`deferred_linear`][oftfx.ops.deferred_linear] takes for each core: x itself.

    Together they are [`rotate_group`][oftfx.ops.rotate_group] and a matmul each, but that no
    rotated x is ever made; the backward is the group's own, where the gradients of x meet.
    """
    result: tuple[Tensor, ...] = apply(_Defer, x, *cores)
    return result


def deferred_linear(x: Tensor, core: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """[`rotated_linear`][oftfx.ops.rotated_linear] of a deferred x.

    Its gradient for x is that for ``x·M``, which `defer` takes further; the core gets none here.
    """
    with exactly(x.device):
        result: Tensor = apply(_DeferredLinear, x, core, bias, weight)
    return result


def packed_linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + bias``, which keeps the bytes of W alone, and its gradient."""
    with exactly(x.device):
        result: Tensor = apply(_PackedLinear, x, bias, weight)
    return result


class _Defer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *cores: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *cores)
        return tuple(x.detach() for _ in cores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *cores = ctx.saved_tensors
        need_x, *need_cores = ctx.needs_input_grad
        grad_x, grad_cores = rotate_group_grad(list(grads), x, cores, need_x, any(need_cores))
        needed = zip(grad_cores, need_cores, strict=True)
        return grad_x if need_x else None, *(grad if need else None for grad, need in needed)


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, core: Tensor, bias: Tensor | None, weight: Packed) -> Tensor:
        ctx.weight = weight
        return linear(x, folded(weight, core, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, need_bias, _ = ctx.needs_input_grad
        grad_x, grad_bias = _packed_grads(ctx.weight, grad, True, need_bias)
        return grad_x, None, grad_bias, None


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Packed) -> Tensor:
        ctx.weight = weight
        return linear(x, dequantised(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_bias, _ = ctx.needs_input_grad
        return *_packed_grads(ctx.weight, grad, need_x, need_bias), None


def _packed_grads(
    weight: Packed, grad: Tensor, need_x: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of what a 4-bit matmul reads, and of its bias."""
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
    return times(grad, dequantised(weight, grad.dtype)) if need_x else None, grad_bias


class _RotatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, core: Tensor, bias: Tensor | None, *stored: Any) -> Tensor:
        saved = kept(x)
        ctx.kept = len(saved)
        ctx.save_for_backward(*saved, core, *(t for t in stored if isinstance(t, Tensor)))
        ctx.rest = [None if isinstance(t, Tensor) else t for t in stored]
        ctx.tensors = [isinstance(t, Tensor) for t in stored]
        result: Tensor = call(ROTATED_LINEAR, x, core, bias, *stored)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        factors, core = list(saved[: ctx.kept]), saved[ctx.kept]
        held = iter(saved[ctx.kept + 1 :])
        stored = [
            next(held) if is_tensor else other
            for is_tensor, other in zip(ctx.tensors, ctx.rest, strict=True)
        ]
        need_x, need_core, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad_core = None
        if need_x or need_core:
            grad_x, grad_core = call(
                ROTATED_LINEAR_GRAD, grad, factors, core, need_x, need_core, *stored
            )
        return (
            grad_x if need_x else None,
            grad_core if need_core else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None,
            *(None for _ in stored),
        )


differentiate(ROTATED_LINEAR, partial(apply, _RotatedLinear))
differentiate(ROTATED_LINEAR_GRAD, _in_turn)
