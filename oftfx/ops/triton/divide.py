"""Gram matrices over rotations, ``M_i R_i⁻ᵀ``, a block a program, all in registers.

``R⁻ᵀ = R (RᵀR)⁻¹``, and RᵀR is positive definite, and for a rotation nearly the identity:
elimination needs no pivots, however far the truncated series is from a rotation.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.triton.blocks import PRECISION
from oftfx.ops.triton.launch import Launch

WIDTHS = {16, 32, 64}


@triton.jit
def _sum(x: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    # As `tl.sum`, which the interpreter takes only where it was chosen before Triton was imported.
    return tl.reduce(x, AXIS, tl.standard._sum_combine, keep_dims=True)


@triton.jit
def _divide(
    gram: tl.tensor,
    core: tl.tensor,
    out: tl.tensor,
    core_block: tl.tensor,
    core_row: tl.tensor,
    core_col: tl.tensor,
    B: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    i, j = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    block = tl.program_id(0).to(tl.int64)
    entry = block * (B * B) + i * B + j
    c = tl.load(core + block * core_block + i * core_row + j * core_col).to(tl.float32)
    m = tl.load(gram + entry)
    # I + C, its square and the product with M, none of which passes the identity through a product
    square = (i == j) + c + tl.trans(c) + tl.dot(tl.trans(c), c, input_precision=PRECISION)
    value = m + tl.dot(m, c, input_precision=PRECISION)
    for k in range(B):  # columns of both, until the square is the identity
        row = _sum(tl.where(i == k, square, 0.0), 0)
        share = (row - (j == k)) / _sum(tl.where(j == k, row, 0.0), 1)
        value -= _sum(tl.where(j == k, value, 0.0), 1) * share
        square -= _sum(tl.where(j == k, square, 0.0), 1) * share
    tl.store(out + entry, value)


def fits(gram: Tensor, core: Tensor) -> bool:
    """Whether the kernel takes these: blocks of its widths, float32 Grams."""
    return gram.dtype is torch.float32 and core.shape[-1] in WIDTHS and core.dtype.itemsize <= 4


def divided(gram: Tensor, core: Tensor) -> Tensor:
    """``gram_i (I + C_i)⁻ᵀ`` of gram (n, b, b), contiguous, and core (n, b, b)."""
    out = torch.empty_like(gram)
    n, b, _ = gram.shape
    _launch(n, b, core.dtype, core.stride(), gram.device)(gram, core, out)
    return out


@functools.lru_cache(maxsize=1024)
def _launch(
    n: int, b: int, dtype: torch.dtype, strides: tuple[int, int, int], device: torch.device
) -> Launch:
    warps = {16: 1, 32: 2, 64: 4}[b]
    return Launch(_divide, n, strides, (b, PRECISION), num_warps=warps)
