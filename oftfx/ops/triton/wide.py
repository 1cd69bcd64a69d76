"""Rotations by wide blocks, and their gradients, as the products of tiles that they are.

A program of `rotate` holds its pack's core, which a wide block's does not fit beside what it
multiplies. Here a program computes one tile of a result and reads what it multiplies in steps, from
a cache that programs beside it fill as well.

    turned      out_i = x + x·C_i                   a tile of rows and of a block's columns
    returned    out = Σ grad_i + grad_i·C_iᵀ        the same: one product, three times as long
    gram        gram_i = xᵀ grad_i                  a tile of a block over a run of rows
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.triton.add import added
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.tiles import Tiles, alike, cut, rows_alike, rows_of, three

NARROWEST = 128
"""From here on."""


@triton.jit
def _multiplied(
    total: tl.tensor,
    source: tl.tensor,
    core: tl.tensor,
    row: tl.tensor,
    row_in: tl.tensor,
    column: tl.tensor,
    stride: int,
    core_row: int,
    core_col: int,
    B: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """``total + source + source·core`` for a tile; source itself never passes through a product."""
    lane = tl.arange(0, STEP)
    column_in = column < B
    total += tl.load(source + row * stride + column, row_in & column_in, 0.0).to(tl.float32)
    for start in range(0, B, STEP):
        k = start + lane
        k_in = k < B
        if EVEN:
            x = tl.load(source + row * stride + k[None, :], row_in, 0.0)
            turn = tl.load(core + k[:, None] * core_row + column * core_col)
        else:
            x = tl.load(source + row * stride + k[None, :], row_in & k_in[None, :], 0.0)
            there = k_in[:, None] & column_in
            turn = tl.load(core + k[:, None] * core_row + column * core_col, there, 0.0)
        total = tl.dot(x, turn.to(x.dtype), total)
    return total


@triton.jit(do_not_specialize=["rows", "n"])
def _turn(
    source_0: tl.tensor,
    source_1: tl.tensor,
    source_2: tl.tensor,
    core_0: tl.tensor,
    core_1: tl.tensor,
    core_2: tl.tensor,
    out_0: tl.tensor,
    out_1: tl.tensor,
    out_2: tl.tensor,
    rows: int,
    n: tl.tensor,
    width: int,
    stride: int,
    core_block: int,
    core_row: int,
    core_col: int,
    B: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    COUNT: tl.constexpr,
    SUMMED: tl.constexpr,
) -> None:
    """A tile of each ``out_i`` or, summed, of the only one."""
    PARTS: tl.constexpr = (B + PART - 1) // PART
    EACH: tl.constexpr = 1 if SUMMED else COUNT
    which = tl.program_id(0) % EACH
    place = tl.program_id(0) // EACH
    column = (place % PARTS * PART + tl.arange(0, PART))[None, :]
    block = place // PARTS % n
    begin = (place // PARTS // n).to(tl.int64) * TILE
    row = tl.arange(0, TILE)[:, None]
    row_in = row < rows - begin
    shift = begin * stride + block.to(tl.int64) * B
    core_shift = block.to(tl.int64) * core_block
    total = tl.full((TILE, PART), 0.0, tl.float32)
    if SUMMED:
        out = out_0
        total = _multiplied(
            total,
            source_0 + shift,
            core_0 + core_shift,
            row,
            row_in,
            column,
            stride,
            core_row,
            core_col,
            B,
            STEP,
            EVEN,
        )
        if COUNT > 1:
            total = _multiplied(
                total,
                source_1 + shift,
                core_1 + core_shift,
                row,
                row_in,
                column,
                stride,
                core_row,
                core_col,
                B,
                STEP,
                EVEN,
            )
        if COUNT > 2:
            total = _multiplied(
                total,
                source_2 + shift,
                core_2 + core_shift,
                row,
                row_in,
                column,
                stride,
                core_row,
                core_col,
                B,
                STEP,
                EVEN,
            )
    else:
        core, out = core_0, out_0
        if COUNT > 1:
            if which == 1:
                core, out = core_1, out_1
        if COUNT > 2:
            if which == 2:
                core, out = core_2, out_2
        total = _multiplied(
            total,
            source_0 + shift,
            core + core_shift,
            row,
            row_in,
            column,
            stride,
            core_row,
            core_col,
            B,
            STEP,
            EVEN,
        )
    out += begin * width + block.to(tl.int64) * B
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), row_in & (column < B))


@triton.jit(do_not_specialize=["rows", "n", "steps"])
def _gram(
    source: tl.tensor,
    grad_0: tl.tensor,
    grad_1: tl.tensor,
    grad_2: tl.tensor,
    out: tl.tensor,
    rows: int,
    n: tl.tensor,
    steps: int,
    stride: int,
    grad_stride: int,
    B: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """A tile (TILE, PART) of each block's ``sourceᵀ grad_i``, over a run of ``steps`` steps."""
    DOWN: tl.constexpr = (B + TILE - 1) // TILE
    ALONG: tl.constexpr = (B + PART - 1) // PART
    along = tl.program_id(0) % ALONG
    down = tl.program_id(0) // ALONG % DOWN
    which = tl.program_id(0) // (ALONG * DOWN) % COUNT
    place = tl.program_id(0) // (ALONG * DOWN * COUNT)
    block, split = place % n, place // n
    begin = split.to(tl.int64) * steps * STEP
    end = tl.minimum(rows - begin, steps * STEP).to(tl.int32)
    shift = block.to(tl.int64) * B
    source += begin * stride + shift
    grad = grad_0
    if COUNT > 1:
        if which == 1:
            grad = grad_1
    if COUNT > 2:
        if which == 2:
            grad = grad_2
    grad += begin * grad_stride + shift
    i = down * TILE + tl.arange(0, TILE)
    j = along * PART + tl.arange(0, PART)
    lane = tl.arange(0, STEP)[:, None]
    found = tl.full((TILE, PART), 0.0, tl.float32)
    for start in range(0, end, STEP):
        row = start + lane
        if EVEN:
            x = tl.load(source + row * stride + i[None, :], row < end, 0.0)
            g = tl.load(grad + row * grad_stride + j[None, :], row < end, 0.0)
        else:
            x = tl.load(source + row * stride + i[None, :], (row < end) & (i < B)[None, :], 0.0)
            g = tl.load(grad + row * grad_stride + j[None, :], (row < end) & (j < B)[None, :], 0.0)
        found = tl.dot(tl.trans(x), g, found)
    out += ((split.to(tl.int64) * COUNT + which) * n + block) * (B * B)
    there = (i < B)[:, None] & (j < B)[None, :]
    tl.store(out + i[:, None] * B + j[None, :], found, there)


class Shape(NamedTuple):
    """A tile of a result, what is read at a time, and as for `Tiles`."""

    tile: int
    part: int
    step: int
    warps: int
    stages: int
    waves: int


TURN = Shape(128, 128, 64, 8, 3, 2)
GRAM = Shape(128, 128, 64, 8, 3, 2)


def serves(x: Tensor, core: Tensor, stride: int = 1) -> bool:
    """Whether this is for here: 16-bit activations, wide blocks of neighbours."""
    return x.dtype.itemsize == 2 and core.shape[-1] >= NARROWEST and stride == 1


def turned(x: Tensor, cores: list[Tensor]) -> list[Tensor]:
    """Rotations of x (…, n·b) of any strides by cores (n, b, b), each contiguous."""
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in cores]
    rows, stride = rows_of(x)
    _turned([rows], stride, [core.to(x.dtype) for core in cores], outs)
    return outs


def returned(grads: list[Tensor], cores: list[Tensor]) -> Tensor:
    """The gradient of what was rotated, from those of the rotations."""
    out = torch.empty(grads[0].shape, dtype=grads[0].dtype, device=grads[0].device)
    rows, stride = rows_alike(grads)
    _turned(rows, stride, [core.to(out.dtype).mT for core in cores], [out])
    return out


def grams(x: Tensor, grads: list[Tensor], cores: list[Tensor]) -> list[Tensor]:
    """The gradients of the cores."""
    outs = [torch.empty(core.shape, dtype=core.dtype, device=x.device) for core in cores]
    rows, stride = rows_of(x)
    flat, grad_stride = rows_alike(grads)
    n, b, _ = cores[0].shape
    strides = (stride, grad_stride)
    launch, splits = gram(_height(x, n, b), n, b, x.dtype, strides, len(grads), x.device)
    found = torch.empty((splits, len(cores), n, b, b), dtype=torch.float32, device=x.device)
    launch(rows, *three(flat), found)
    added(found, *outs)
    return outs


def _turned(rows: list[Tensor], stride: int, cores: list[Tensor], outs: list[Tensor]) -> None:
    cores, strides = alike(cores)
    n, b, _ = cores[0].shape
    out = outs[0]
    summed = len(rows) > 1
    count = len(cores)
    launch = turn(_height(out, n, b), n, b, out.dtype, stride, strides, count, summed, out.device)
    launch(*three(rows), *three(cores), *three(outs))


def _height(x: Tensor, n: int, b: int) -> int:
    return x.numel() // (n * b) if n else 0


@functools.lru_cache(maxsize=4096)
def turn(
    rows: int,
    n: int,
    b: int,
    dtype: torch.dtype,
    stride: int,
    core_strides: tuple[int, int, int],
    count: int,
    summed: bool,
    device: torch.device,
) -> Launch:
    tile, part, step, warps, stages, _ = TURN
    programs = triton.cdiv(rows, tile) * n * triton.cdiv(b, part) * (1 if summed else count)
    even = b % part == 0 and b % step == 0
    constants = (b, tile, part, step, even, count, summed)
    numbers = (rows, n, n * b, stride, *core_strides)
    return Launch(_turn, programs, numbers, constants, num_warps=warps, num_stages=stages)


@functools.lru_cache(maxsize=4096)
def gram(
    rows: int,
    n: int,
    b: int,
    dtype: torch.dtype,
    strides: tuple[int, int],
    count: int,
    device: torch.device,
) -> tuple[Launch, int]:
    tile, part, step, warps, stages, waves = GRAM
    each = count * triton.cdiv(b, tile) * triton.cdiv(b, part)
    chosen = Tiles(1, 1, 1, step, warps, stages, waves)
    programs, steps, splits = cut(rows, n * each, chosen, device, max(*strides, n * b))
    constants = (b, tile, part, step, b % tile == 0 and b % part == 0, count)
    numbers = (rows, n, steps, *strides)
    launch = Launch(_gram, programs, numbers, constants, num_warps=warps, num_stages=stages)
    return launch, splits
