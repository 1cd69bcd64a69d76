"""`oftfx::cayley`: skew parameters to residual rotation blocks, all blocks at once."""

import functools
from typing import Any, Optional

import torch
from torch import Tensor

from oftfx.ops.kernels import kernels, on
from oftfx.ops.precision import as_given
from oftfx.rotations import cayley as maths


@torch.library.custom_op("oftfx::cayley", mutates_args=())
def cayley(theta: Tensor, block_size: int, order: Optional[int]) -> Tensor:  # noqa: UP045 (schema)
    """``R − I`` of every block, by the series of the given order or exactly.

    Args:
        theta: (…, b(b−1)/2), the strict upper triangles.
        block_size: b.
        order: k of the Cayley–Neumann series; None for the exact Cayley transform.

    Returns:
        (…, b, b), float32 (float64 for float64 parameters): a core keeps its digits even where
        parameters and activations are stored in less.
    """
    return _cayley(theta, block_size, order)


@as_given
def _cayley(theta: Tensor, block_size: int, order: int | None) -> Tensor:
    known = _layout(block_size, theta.device)
    q = maths.skew(theta.flatten(0, -2).to(_core_dtype(theta)), block_size, known)
    core = maths.exact(q) if order is None else maths.neumann(q, order)
    return core.view(*theta.shape[:-1], block_size, block_size)


@torch.library.impl("oftfx::cayley", ("cpu", "cuda"))
def _(theta: Tensor, block_size: int, order: Optional[int]) -> Tensor:  # noqa: UP045
    fast = kernels("cayley", theta.device)
    if fast is None or not fast.fits(theta, block_size, order):
        return _cayley(theta, block_size, order)
    with on(theta.device):
        return fast.cayley(theta, block_size, order)


@cayley.register_fake
def _(theta: Tensor, block_size: int, order: Optional[int]) -> Tensor:  # noqa: UP045
    torch._check(theta.shape[-1] == block_size * (block_size - 1) // 2)
    return theta.new_empty(*theta.shape[:-1], block_size, block_size, dtype=_core_dtype(theta))


@torch.library.custom_op("oftfx::cayley_grad", mutates_args=())
def cayley_grad(
    grad: Tensor,
    theta: Tensor,
    block_size: int,
    order: Optional[int],  # noqa: UP045
) -> Tensor:
    """Gradient of [`cayley`][oftfx.ops.cayley]: (…, b, b) to theta's shape and dtype."""
    return _gradient(grad, theta, block_size, order, _layout(block_size, theta.device))


@torch.library.impl("oftfx::cayley_grad", ("cpu", "cuda"))
def _(grad: Tensor, theta: Tensor, block_size: int, order: Optional[int]) -> Tensor:  # noqa: UP045
    fast = kernels("cayley", theta.device)
    if fast is None or not fast.fits(theta, block_size, order):
        return _gradient(grad, theta, block_size, order, _layout(block_size, theta.device))
    with on(theta.device):
        return fast.cayley_grad(grad, theta, block_size, order)


@cayley_grad.register_fake
def _(grad: Tensor, theta: Tensor, block_size: int, order: Optional[int]) -> Tensor:  # noqa: UP045
    return theta.new_empty(theta.shape)


@as_given
def _gradient(
    grad: Tensor,
    theta: Tensor,
    block_size: int,
    order: int | None,
    known: maths.Layout | None = None,
) -> Tensor:
    q = maths.skew(theta.flatten(0, -2).to(grad.dtype), block_size, known)
    grad = grad.flatten(0, -3)
    if order is None:
        grad_q = maths.exact_grad(maths.exact(q), grad)
    else:
        grad_q = maths.neumann_grad(q, order, grad)
    return maths.skew_grad(grad_q, known).to(theta.dtype).view(theta.shape)


@functools.cache
def _layout(block_size: int, device: torch.device) -> maths.Layout:
    """Index tensors, made once: only kernels use them, so no tracer ever meets them."""
    with torch.inference_mode(False):
        return maths.layout(block_size, device)


def _core_dtype(theta: Tensor) -> torch.dtype:
    return torch.promote_types(theta.dtype, torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, int, int | None], output: Tensor) -> None:
    theta, ctx.block_size, ctx.order = inputs
    ctx.save_for_backward(theta)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (theta,) = ctx.saved_tensors
    return cayley_grad(grad, theta, ctx.block_size, ctx.order), None, None


def _save_grad(ctx: Any, inputs: tuple[Tensor, Tensor, int, int | None], output: Tensor) -> None:
    grad, theta, ctx.block_size, ctx.order = inputs
    ctx.save_for_backward(grad, theta)


def _grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    """Second order, by differentiating the gradient's own formula."""
    first, theta = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
    with torch.enable_grad():
        value = _gradient(first, theta, ctx.block_size, ctx.order)
        grad_grad, theta_grad = torch.autograd.grad(value, (first, theta), grad)
    return grad_grad, theta_grad, None, None


cayley.register_autograd(_backward, setup_context=_save)
cayley_grad.register_autograd(_grad_backward, setup_context=_save_grad)
