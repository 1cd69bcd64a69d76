"""`oftfx::rounded_cayley`: cores in 16 bits, for activations in 16 bits.

    before                                    after
    C = cayley(theta, b, k).to(bfloat16)      C = rounded_cayley(theta, b, k, bfloat16)

A rotation rounds its core to the dtype of what it turns. Where that is all that a core is for, it
need not be exact before: in 16 bits its products take less than half the time, and it half the
memory. The skew matrix is rounded first, so that what comes out is the core of a rotation near by,
as orthogonal as any, and not one with errors of its own.
"""

from typing import Any

import torch
from torch import Tensor

from oftfx.ops.cayley import cayley, cayley_grad, core_dtype
from oftfx.ops.define import LIBRARY, call, define, differentiate
from oftfx.ops.kernels import kernels, on


def rounded_cayley(theta: Tensor, block_size: int, order: int, dtype: torch.dtype) -> Tensor:
    """[`cayley`][oftfx.ops.cayley] in fewer digits.

    Args:
        theta: (…, b(b−1)/2), the strict upper triangles.
        block_size: b.
        order: k of the Cayley–Neumann series.
        dtype: A 16-bit one.

    Returns:
        (…, b, b) in this dtype, as its gradient is: at most twice as far from the exact core as the
        nearest of this dtype.
    """
    result: Tensor = call(ROUNDED_CAYLEY, theta, block_size, order, dtype)
    return result


def served(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel gains by it: in bfloat16, on a GPU.

    In float16 the gradient of a loss that is scaled would not fit.
    """
    return hasattr(kernels("cayley", device), "rounded") and dtype == torch.bfloat16


def _rounded_cayley(theta: Tensor, block_size: int, order: int, dtype: torch.dtype) -> Tensor:
    fast: Any = kernels("cayley", theta.device)
    if not (served(dtype, theta.device) and fast.fits(theta, block_size, order)):
        return cayley(theta, block_size, order).to(dtype)
    with on(theta.device):
        result: Tensor = fast.rounded(theta, block_size, order, dtype)
    return result


ROUNDED_CAYLEY = define(
    "rounded_cayley(Tensor theta, int block_size, int order, ScalarType dtype) -> Tensor",
    _rounded_cayley,
)


@torch.library.register_fake("oftfx::rounded_cayley", lib=LIBRARY)
def _(theta: Tensor, block_size: int, order: int, dtype: torch.dtype) -> Tensor:
    torch._check(theta.shape[-1] == block_size * (block_size - 1) // 2)
    return theta.new_empty(*theta.shape[:-1], block_size, block_size, dtype=dtype)


def rounded_cayley_grad(grad: Tensor, theta: Tensor, block_size: int, order: int) -> Tensor:
    """Gradient of [`rounded_cayley`][oftfx.ops.rounded_cayley]: (…, b, b) to theta's shape."""
    result: Tensor = call(ROUNDED_CAYLEY_GRAD, grad, theta, block_size, order)
    return result


def _rounded_cayley_grad(grad: Tensor, theta: Tensor, block_size: int, order: int) -> Tensor:
    fast: Any = kernels("cayley", theta.device)
    if not (served(grad.dtype, theta.device) and fast.fits(theta, block_size, order)):
        return _of_exact(grad, theta, block_size, order)
    with on(theta.device):
        result: Tensor = fast.rounded_grad(grad, theta, block_size, order)
    return result


def _of_exact(grad: Tensor, theta: Tensor, block_size: int, order: int) -> Tensor:
    return cayley_grad(grad.to(core_dtype(theta)), theta, block_size, order)


ROUNDED_CAYLEY_GRAD = define(
    "rounded_cayley_grad(Tensor grad, Tensor theta, int block_size, int order) -> Tensor",
    _rounded_cayley_grad,
)


@torch.library.register_fake("oftfx::rounded_cayley_grad", lib=LIBRARY)
def _(grad: Tensor, theta: Tensor, block_size: int, order: int) -> Tensor:
    return theta.new_empty(theta.shape)


class _RoundedCayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, block_size: int, order: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(theta)
        ctx.block_size, ctx.order = block_size, order
        result: Tensor = call(ROUNDED_CAYLEY, theta, block_size, order, dtype)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (theta,) = ctx.saved_tensors
        return rounded_cayley_grad(grad, theta, ctx.block_size, ctx.order), None, None, None


differentiate(ROUNDED_CAYLEY, _RoundedCayley.apply)
differentiate(ROUNDED_CAYLEY_GRAD, _of_exact)
