"""Cayley–Neumann cores of several parameters in one call, and their gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from oftfx.ops.native.binding import call
from oftfx.ops.native.rotate_group import addresses, plain

LARGEST = 256
"""The widest block; of wider ones the matrices leave the cache."""


def fits(theta: Tensor, block_size: int, order: int | None) -> bool:
    """Whether the kernels take these: a series, of float32 parameters."""
    return order is not None and block_size <= LARGEST and theta.dtype == torch.float32


def cayley_each(thetas: Sequence[Tensor], block_size: int, order: int) -> list[Tensor]:
    """`oftfx::cayley_each`: several parameters of one shape in one call."""
    n, b = thetas[0].shape[:-1].numel(), block_size
    thetas, like = plain(*thetas), thetas[0].new_empty(*thetas[0].shape[:-1], b, b)
    cores = [torch.empty_like(like) for _ in thetas]
    operands = addresses(*thetas, *cores)
    call("cayley", len(thetas) * n * order * b**3, len(thetas), n, b, order, *operands)
    return cores


def cayley_each_grad(
    grads: Sequence[Tensor], thetas: Sequence[Tensor], block_size: int, order: int
) -> list[Tensor]:
    """`oftfx::cayley_each_grad`: for each its gradient, (…, b, b) to (…, b(b−1)/2)."""
    n, b = thetas[0].shape[:-1].numel(), block_size
    thetas, grads = plain(*thetas), plain(*grads)
    outs = [torch.empty_like(theta) for theta in thetas]
    operands = addresses(*thetas, *outs, *grads)
    call("cayley_grad", 2 * len(thetas) * n * order * b**3, len(thetas), n, b, order, *operands)
    return outs
