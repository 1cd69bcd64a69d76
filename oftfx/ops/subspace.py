"""`oftfx::subspace`: a map that turns a few directions of the last axis, and its gradients.

Opaque like `rotate`, and for the same reason: the backward needs x, the support and the kernel, and
nothing else of x's size. The few coordinates ``x·Pᵀ`` are cheaper to compute again than to keep.
"""

from typing import Any

import torch
from torch import Tensor

from oftfx.ops.precision import as_given


@torch.library.custom_op("oftfx::subspace", mutates_args=())
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
    return of_aten(x, support, kernel)


@as_given
def of_aten(x: Tensor, support: Tensor, kernel: Tensor) -> Tensor:
    """[`subspace`][oftfx.ops.subspace] of PyTorch's own ops."""
    _check(x, support, kernel)
    rows, p = x.reshape(-1, x.shape[-1]), support.to(x.dtype)
    return torch.addmm(rows, (rows @ p.mT) @ kernel.to(x.dtype), p).view(x.shape)


@subspace.register_fake
def _(x: Tensor, support: Tensor, kernel: Tensor) -> Tensor:
    _check(x, support, kernel)
    return x.new_empty(x.shape)


@torch.library.custom_op("oftfx::subspace_grad", mutates_args=())
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
    # `subspace` here is an eager kernel within a kernel: no autograd is recorded below an op.
    grad_x = subspace(grad, support, kernel.mT) if need_x else grad.new_empty(0)
    grad_support, grad_kernel = support.new_empty(0), kernel.new_empty(0)
    if need_support or need_kernel:
        of_support, of_kernel = _grams(grad, x, support, kernel, need_support)
        if of_support is not None:
            grad_support = of_support.to(support.dtype)
        if need_kernel:
            grad_kernel = of_kernel.to(kernel.dtype)
    return grad_x, grad_support, grad_kernel


@subspace_grad.register_fake
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


def _grams(
    grad: Tensor, x: Tensor, support: Tensor, kernel: Tensor, need_support: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the support and of the kernel, in x's dtype: sums over all rows."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    p, k = support.to(x.dtype), kernel.to(x.dtype)
    inside, grads_inside = rows @ p.mT, grads @ p.mT
    grad_support = None
    if need_support:  # P reads x and writes the result
        grad_support = (inside @ k).mT @ grads + (grads_inside @ k.mT).mT @ rows
    return grad_support, inside.mT @ grads_inside


def _check(x: Tensor, support: Tensor, kernel: Tensor) -> None:
    r, d = support.shape
    torch._check(
        x.shape[-1] == d and tuple(kernel.shape) == (r, r),
        lambda: (
            f"oftfx::subspace: x of shape {tuple(x.shape)}, a support of shape "
            f"{tuple(support.shape)} and a kernel of shape {tuple(kernel.shape)} do not fit: they "
            f"must be (..., d), (r, d) and (r, r)."
        ),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _subspace_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    grads = subspace_grad(grad, *ctx.saved_tensors, *needed)
    return tuple(g if need else None for g, need in zip(grads, needed, strict=True))


def _save_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.need_x, ctx.need_support, ctx.need_kernel = inputs
    ctx.save_for_backward(*operands)


def _subspace_grad_backward(
    ctx: Any, grad_x: Tensor, grad_support: Tensor, grad_kernel: Tensor
) -> tuple[Tensor | None, ...]:
    """Second order, by differentiating the gradients' own formulas."""
    operands = tuple(tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
    grad, x, support, kernel = operands
    values, cotangents = [], []
    with torch.enable_grad():
        if ctx.need_x:
            values.append(subspace(grad, support, kernel.mT))
            cotangents.append(grad_x)
        of_support, of_kernel = _grams(grad, x, support, kernel, ctx.need_support)
        if of_support is not None:
            values.append(of_support.to(support.dtype))
            cotangents.append(grad_support)
        if ctx.need_kernel:
            values.append(of_kernel.to(kernel.dtype))
            cotangents.append(grad_kernel)
        second = torch.autograd.grad(values, operands, cotangents, allow_unused=True)
    return (*second, None, None, None)


subspace.register_autograd(_subspace_backward, setup_context=_save)
subspace_grad.register_autograd(_subspace_grad_backward, setup_context=_save_grad)
