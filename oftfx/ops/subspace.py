"""`oftfx::subspace`: a map that turns a few directions of the last axis, and its gradients.

Opaque like `rotate`, and for the same reason: the backward needs x, the support and the kernel, and
nothing else of x's size. The few coordinates ``x·Pᵀ`` are cheaper to compute again than to keep.
"""

from typing import Any

import torch
from torch import Tensor

from oftfx.ops.define import LIBRARY, call, define, differentiate
from oftfx.ops.precision import as_given


def subspace(x: Tensor, support: Tensor, kernel: Tensor) -> Tensor:
    """``x·(I + PᵀKP) = x + (x·Pᵀ)·K·P``, in residual form.

    Args:
        x: (..., d), floating.
        support: P, (r, d), computed with in x's dtype. Its rows need not be orthonormal.
        kernel: K, (r, r), what acts on those directions less the identity, T − I; computed with in
            x's dtype.

    Returns:
        (..., d) in x's dtype, contiguous.

    Raises:
        RuntimeError: The shapes do not fit.
    """
    result: Tensor = call(SUBSPACE, x, support, kernel)
    return result


@as_given
def of_aten(x: Tensor, support: Tensor, kernel: Tensor) -> Tensor:
    """[`subspace`][oftfx.ops.subspace] of PyTorch's own ops."""
    if not _fits(x, support, kernel):
        raise RuntimeError(_misfit(x, support, kernel))
    rows, p = x.reshape(-1, x.shape[-1]), support.to(x.dtype)
    return torch.addmm(rows, (rows @ p.mT) @ kernel.to(x.dtype), p).view(x.shape)


SUBSPACE = define("subspace(Tensor x, Tensor support, Tensor kernel) -> Tensor", of_aten)


@torch.library.register_fake("oftfx::subspace", lib=LIBRARY)
def _(x: Tensor, support: Tensor, kernel: Tensor) -> Tensor:
    torch._check(_fits(x, support, kernel), lambda: _misfit(x, support, kernel))
    return x.new_empty(x.shape)


def subspace_grad(
    grad: Tensor,
    x: Tensor,
    support: Tensor,
    kernel: Tensor,
    need_x: bool,
    need_support: bool,
    need_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of [`subspace`][oftfx.ops.subspace]; one that is not needed comes back empty.

    Args:
        grad: (..., d), the gradient of the result.
        x: (..., d), what was mapped.
        support: (r, d).
        kernel: (r, r).
        need_x: Whether the gradient of x is wanted.
        need_support: Whether the gradient of the support is wanted.
        need_kernel: Whether the gradient of the kernel is wanted.

    Returns:
        (..., d), (r, d) and (r, r), each in its operand's dtype.
    """
    operands = (grad, x, support, kernel, need_x, need_support, need_kernel)
    result: tuple[Tensor, Tensor, Tensor] = call(SUBSPACE_GRAD, *operands)
    return result


@as_given
def _subspace_grad(
    grad: Tensor,
    x: Tensor,
    support: Tensor,
    kernel: Tensor,
    need_x: bool,
    need_support: bool,
    need_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    p, k = support.to(x.dtype), kernel.to(x.dtype)
    grad_x, grad_support, grad_kernel = (each.new_empty(0) for each in (grad, support, kernel))
    grads_inside = grads @ p.mT
    if need_x or need_support:
        back = grads_inside @ k.mT
    if need_x:
        grad_x = torch.addmm(grads, back, p).view(x.shape)
    if need_support or need_kernel:
        inside = rows @ p.mT
    if need_support:  # P reads x and writes the result
        grad_support = torch.addmm(back.mT @ rows, (inside @ k).mT, grads).to(support.dtype)
    if need_kernel:
        grad_kernel = (inside.mT @ grads_inside).to(kernel.dtype)
    return grad_x, grad_support, grad_kernel


SUBSPACE_GRAD = define(
    "subspace_grad(Tensor grad, Tensor x, Tensor support, Tensor kernel, bool need_x, "
    "bool need_support, bool need_kernel) -> (Tensor, Tensor, Tensor)",
    _subspace_grad,
)


@torch.library.register_fake("oftfx::subspace_grad", lib=LIBRARY)
def _(
    grad: Tensor,
    x: Tensor,
    support: Tensor,
    kernel: Tensor,
    need_x: bool,
    need_support: bool,
    need_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(x.shape if need_x else 0),
        support.new_empty(support.shape if need_support else 0),
        kernel.new_empty(kernel.shape if need_kernel else 0),
    )


def _fits(x: Tensor, support: Tensor, kernel: Tensor) -> bool:
    r, d = support.shape
    return x.shape[-1] == d and tuple(kernel.shape) == (r, r)


def _misfit(x: Tensor, support: Tensor, kernel: Tensor) -> str:
    return (
        f"oftfx::subspace: x of shape {tuple(x.shape)}, a support of shape "
        f"{tuple(support.shape)} and a kernel of shape {tuple(kernel.shape)} do not fit: they "
        f"must be (..., d), (r, d) and (r, r)."
    )


class _Subspace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, support: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, support, kernel)
        result: Tensor = call(SUBSPACE, x, support, kernel)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        grads = call(SUBSPACE_GRAD, grad, *ctx.saved_tensors, *needed)
        return tuple(g if need else None for g, need in zip(grads, needed, strict=True))


differentiate(SUBSPACE, _Subspace.apply)
differentiate(SUBSPACE_GRAD, _subspace_grad)
