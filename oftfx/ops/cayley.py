"""`oftfx::cayley`: skew parameters to residual rotation blocks, all blocks at once."""

from typing import Any, Optional

import torch
from torch import Tensor

from oftfx.rotations import cayley as maths


@torch.library.custom_op("oftfx::cayley", mutates_args=())
def cayley(theta: Tensor, block_size: int, order: Optional[int]) -> Tensor:  # noqa: UP045 (schema)
    """``R − I`` of every block, by the series of the given order or exactly.

    Args:
        theta: (n, b(b−1)/2), the strict upper triangles.
        block_size: b.
        order: k of the Cayley–Neumann series; None for the exact Cayley transform.

    Returns:
        (n, b, b), float32 (float64 for float64 parameters): a core keeps its digits even where
        parameters and activations are stored in less.
    """
    q = maths.skew(theta.to(_core_dtype(theta)), block_size)
    return maths.exact(q) if order is None else maths.neumann(q, order)


@cayley.register_fake
def _(theta: Tensor, block_size: int, order: Optional[int]) -> Tensor:  # noqa: UP045
    torch._check(theta.shape[-1] == block_size * (block_size - 1) // 2)
    return theta.new_empty(theta.shape[0], block_size, block_size, dtype=_core_dtype(theta))


def _core_dtype(theta: Tensor) -> torch.dtype:
    return torch.promote_types(theta.dtype, torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, int, int | None], output: Tensor) -> None:
    theta, ctx.block_size, ctx.order = inputs
    ctx.save_for_backward(theta, output if ctx.order is None else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    theta, core = ctx.saved_tensors
    if ctx.order is None:
        grad_q = maths.exact_grad(core, grad)
    else:
        q = maths.skew(theta.to(grad.dtype), ctx.block_size)
        grad_q = maths.neumann_grad(q, ctx.order, grad)
    return maths.skew_grad(grad_q).to(theta.dtype), None, None


cayley.register_autograd(_backward, setup_context=_save)
