"""Cayley–Neumann cores and their gradient; a block's matrices stay in the cache throughout."""

from torch import Tensor

from oftfx.ops.native.cayley_each import cayley_each, cayley_each_grad, fits

__all__ = ["cayley", "cayley_grad", "fits"]


def cayley(theta: Tensor, block_size: int, order: int) -> Tensor:
    """`oftfx::cayley`: theta (…, b(b−1)/2) to (…, b, b)."""
    (core,) = cayley_each([theta], block_size, order)
    return core


def cayley_grad(grad: Tensor, theta: Tensor, block_size: int, order: int) -> Tensor:
    """`oftfx::cayley_grad`: the gradient (…, b, b) of the cores to theta's."""
    (out,) = cayley_each_grad([grad], [theta], block_size, order)
    return out
