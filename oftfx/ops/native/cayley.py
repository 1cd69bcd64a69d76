"""Cayley–Neumann cores and their gradient; a block's matrices stay in the cache throughout."""

import torch
from torch import Tensor

from oftfx.ops.native.binding import call

LARGEST = 256
"""The widest block; of wider ones the matrices leave the cache."""


def fits(theta: Tensor, block_size: int, order: int | None) -> bool:
    """Whether the kernels take these: a series, of float32 parameters."""
    return order is not None and block_size <= LARGEST and theta.dtype == torch.float32


def cayley(theta: Tensor, block_size: int, order: int) -> Tensor:
    """`oftfx::cayley`: theta (…, b(b−1)/2) to (…, b, b)."""
    n, b = theta.shape[:-1].numel(), block_size
    core = torch.empty(*theta.shape[:-1], b, b, dtype=theta.dtype)
    theta = theta.contiguous()
    call("cayley", n * order * b**3, theta.data_ptr(), core.data_ptr(), n, b, order)
    return core


def cayley_grad(grad: Tensor, theta: Tensor, block_size: int, order: int) -> Tensor:
    """`oftfx::cayley_grad`: the gradient (…, b, b) of the cores to theta's."""
    n, b = theta.shape[:-1].numel(), block_size
    out = torch.empty(theta.shape, dtype=theta.dtype)
    grad, theta = grad.to(theta.dtype).contiguous(), theta.contiguous()
    pointers = (grad.data_ptr(), theta.data_ptr(), out.data_ptr())
    call("cayley_grad", 2 * n * order * b**3, *pointers, n, b, order)
    return out
