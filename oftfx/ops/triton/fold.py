"""A weight in 16 bits folded in float32 and rounded once, in one pass over it, in place if wanted.

    out = W + W·blockdiag(C)ᵀ

W's numbers are exact in the 19 bits that tensor cores read of a float32, and the core is the sum of
two that are. So two products give nearly all of float32's digits, where three would be needed of
two operands that have to be cut.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.triton.blocks import columns_of, diagonal, load_rows, locate
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.tiles import Tiles, layout, like, longest, options

LARGEST = 64
"""The widest block whose rows and columns one program has whole: in place, none may be late."""
RUN = 4
"""Tiles of rows a program has, as measured on one H100; the next program begins when it ends."""


@triton.jit(do_not_specialize=["rows", "n", "tiles"])
def _fold(
    weight: tl.tensor,
    core: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    tiles: tl.tensor,
    stride: tl.tensor,
    out_stride: tl.tensor,
    core_block: tl.tensor,
    core_row: tl.tensor,
    core_col: tl.tensor,
    B: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """A pack's columns, over ``tiles`` tiles of rows."""
    _, first, begin, end = locate(rows, n, tiles, PACK, WIDE // PART, TILE)
    column, column_in, _, _ = columns_of(first, n, B, PACK, WIDE, PART, EVEN)
    shift = first.to(tl.int64) * B
    weight += begin * stride + shift
    out += begin * out_stride + shift
    turn = diagonal(
        core, first, n, column, core_block, core_row, core_col, B, PACK, WIDE, tl.float32
    )
    large = (turn.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # 19 bits
    small = turn - large
    lane = tl.arange(0, TILE)
    for start in range(0, end, TILE):
        row = start + lane
        w = load_rows(weight, row, end, stride, column, column_in).to(tl.float32)
        turned = tl.dot(w, small, w, input_precision="tf32")
        turned = tl.dot(w, large, turned, input_precision="tf32")
        place = out + row[:, None] * out_stride + column[None, :]
        there = (row < end)[:, None] & column_in[None, :]
        tl.store(place, turned.to(out.dtype.element_ty), there)


def fits(weight: Tensor, core: Tensor) -> bool:
    """Whether the kernel takes these: rows of 16 bits of their own, a float32 core a block."""
    n, b, _ = core.shape
    return (
        weight.dtype.itemsize == 2
        and core.dtype == torch.float32
        and b <= LARGEST
        and weight.shape[1] == n * b
        and weight.stride(1) == 1
        and (len(weight) < 2 or weight.stride(0) >= weight.shape[1])
    )


def folded(weight: Tensor, core: Tensor, dtype: torch.dtype, into: Tensor | None) -> Tensor:
    """``W blockdiag(I + C_1 … I + C_n)ᵀ`` in a dtype, perhaps into the weight's own memory."""
    out = into
    if out is None or out.stride(1) != 1:
        out = like(weight, dtype)
    rows, _ = weight.shape
    n, b, _ = core.shape
    strides = (weight.stride(0), out.stride(0), *core.mT.stride())
    dtypes = (weight.dtype, out.dtype)
    _launch(rows, n, b, strides, dtypes, weight.device)(weight, core, out)
    if into is None:
        return out
    if into is not out:
        return into.copy_(out)
    if not into.is_inference():  # a graph that read the weight before must not go on unawares
        torch.autograd.graph.increment_version(into)
    return into


@functools.lru_cache(maxsize=1024)
def _launch(
    rows: int,
    n: int,
    b: int,
    strides: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
) -> Launch:
    pack = max(1, LARGEST // b)
    wide = max(16, triton.next_power_of_2(pack * b))
    chosen = Tiles(pack, wide, wide, 64, 4, 0, 0)
    run = min(RUN, longest(chosen.tile, max(strides[:2])))
    programs = triton.cdiv(n, pack) * max(1, triton.cdiv(rows, run * chosen.tile))
    numbers = (rows, n, run, *strides)
    return Launch(_fold, programs, numbers, layout(n, b, chosen), **options(chosen))
