"""`oftfx::cayley`: skew parameters to residual rotation blocks, all blocks at once."""

import functools
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.define import LIBRARY, apply, call, define, differentiate
from oftfx.ops.kernels import kernels, on
from oftfx.ops.precision import as_given
from oftfx.rotations import cayley as maths


def cayley(theta: Tensor, block_size: int, order: int | None) -> Tensor:
    """``R − I`` of every block, by the series of the given order or exactly.

    Args:
        theta: (…, b(b−1)/2), the strict upper triangles.
        block_size: b.
        order: k of the Cayley–Neumann series; None for the exact Cayley transform.

    Returns:
        (…, b, b), float32 (float64 for float64 parameters): a core keeps its digits even where
        parameters and activations are stored in less.
    """
    result: Tensor = call(CAYLEY, theta, block_size, order)
    return result


def _cayley(theta: Tensor, block_size: int, order: int | None) -> Tensor:
    fast = kernels("cayley", theta.device)
    if fast is None or not fast.fits(theta, block_size, order):
        return _in_pytorch(theta, block_size, order)
    with on(theta.device):
        result: Tensor = fast.cayley(theta, block_size, order)
    return result


CAYLEY = define("cayley(Tensor theta, int block_size, int? order) -> Tensor", _cayley)


@torch.library.register_fake("oftfx::cayley", lib=LIBRARY)
def _(theta: Tensor, block_size: int, order: int | None) -> Tensor:
    torch._check(theta.shape[-1] == block_size * (block_size - 1) // 2)
    return theta.new_empty(*theta.shape[:-1], block_size, block_size, dtype=core_dtype(theta))


@as_given
def _in_pytorch(theta: Tensor, block_size: int, order: int | None) -> Tensor:
    known = _layout(block_size, theta.device)
    q = maths.skew(theta.flatten(0, -2).to(core_dtype(theta)), block_size, known)
    core = maths.exact(q) if order is None else maths.neumann(q, order)
    return core.view(*theta.shape[:-1], block_size, block_size)


def cayley_grad(grad: Tensor, theta: Tensor, block_size: int, order: int | None) -> Tensor:
    """Gradient of [`cayley`][oftfx.ops.cayley]: (…, b, b) to theta's shape and dtype."""
    result: Tensor = call(CAYLEY_GRAD, grad, theta, block_size, order)
    return result


def _cayley_grad(grad: Tensor, theta: Tensor, block_size: int, order: int | None) -> Tensor:
    fast = kernels("cayley", theta.device)
    if fast is None or not fast.fits(theta, block_size, order):
        return _gradient(grad, theta, block_size, order, _layout(block_size, theta.device))
    with on(theta.device):
        result: Tensor = fast.cayley_grad(grad, theta, block_size, order)
    return result


CAYLEY_GRAD = define(
    "cayley_grad(Tensor grad, Tensor theta, int block_size, int? order) -> Tensor", _cayley_grad
)


@torch.library.register_fake("oftfx::cayley_grad", lib=LIBRARY)
def _(grad: Tensor, theta: Tensor, block_size: int, order: int | None) -> Tensor:
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


def core_dtype(theta: Tensor) -> torch.dtype:
    """Of the exact cores of these parameters, and of their gradients."""
    return torch.promote_types(theta.dtype, torch.float32)


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, block_size: int, order: int | None) -> Tensor:
        ctx.save_for_backward(theta)
        ctx.block_size, ctx.order = block_size, order
        result: Tensor = call(CAYLEY, theta, block_size, order)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (theta,) = ctx.saved_tensors
        return cayley_grad(grad, theta, ctx.block_size, ctx.order), None, None


differentiate(CAYLEY, functools.partial(apply, _Cayley))
differentiate(CAYLEY_GRAD, _gradient)
