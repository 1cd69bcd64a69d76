"""Rotations by wide blocks, and their gradients, as the products of tiles that they are.

A program of `rotate` holds its pack's core. A wide block's does not fit beside a Gram or beside
other rotations' cores, and the widest do not fit at all. Here a program computes one tile of a
result and reads what it multiplies in steps, from a cache that programs beside it fill as well.

    turned      out = x + x·C                   a tile of rows and of a block's columns
    returned    dx = Σ grad_i + grad_i·C_iᵀ     the same: one product, up to three times as long
    grams       gram_i = xᵀ grad_i              a tile of a block over a run of rows
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.triton.add import added
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.tiles import (
    Work,
    alike,
    like,
    longest,
    processors,
    rows_alike,
    rows_of,
    three,
)

NARROWEST = 128
"""From here on a program may not hold a core."""


@triton.jit(do_not_specialize=["rows", "n"])
def _turn(
    source_0: tl.tensor,
    source_1: tl.tensor,
    source_2: tl.tensor,
    core_0: tl.tensor,
    core_1: tl.tensor,
    core_2: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    core_block: tl.tensor,
    core_row: tl.tensor,
    core_col: tl.tensor,
    B: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """A tile of ``out = Σ source_i + source_i·core_i``; no source itself meets a product."""
    PARTS: tl.constexpr = (B + PART - 1) // PART
    column = (tl.program_id(0) % PARTS * PART + tl.arange(0, PART))[None, :]
    place = tl.program_id(0) // PARTS
    block = (place % n).to(tl.int64)
    begin = (place // n).to(tl.int64) * TILE
    row = tl.arange(0, TILE)[:, None]
    row_in = row < rows - begin
    here = row_in if EVEN else row_in & (column < B)
    lane = tl.arange(0, STEP)
    shift = begin * stride + block * B
    core_shift = block * core_block
    total = tl.full((TILE, PART), 0.0, tl.float32)
    for i in tl.static_range(COUNT):
        source = source_0 if i == 0 else source_1 if i == 1 else source_2
        total += tl.load(source + shift + row * stride + column, here, 0.0).to(tl.float32)
    for i in tl.static_range(COUNT):
        source = source_0 if i == 0 else source_1 if i == 1 else source_2
        core = core_0 if i == 0 else core_1 if i == 1 else core_2
        for start in range(0, B, STEP):
            k = start + lane
            source_at = source + shift + row * stride + k[None, :]
            core_at = core + core_shift + k[:, None] * core_row + column * core_col
            if EVEN:
                x = tl.load(source_at, row_in, 0.0)
                turn = tl.load(core_at)
            else:
                x = tl.load(source_at, row_in & (k < B)[None, :], 0.0)
                turn = tl.load(core_at, (k < B)[:, None] & (column < B), 0.0)
            total = tl.dot(x, turn.to(x.dtype), total)
    out += begin * width + block * B
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), here)


@triton.jit(do_not_specialize=["rows", "n", "steps"])
def _gram(
    source: tl.tensor,
    grad_0: tl.tensor,
    grad_1: tl.tensor,
    grad_2: tl.tensor,
    out_0: tl.tensor,
    out_1: tl.tensor,
    out_2: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    steps: tl.tensor,
    apart: tl.tensor,
    stride: tl.tensor,
    grad_stride: tl.tensor,
    B: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """A tile (TILE, PART) of each block's ``sourceᵀ grad_i``, over a run of ``steps`` steps.

    What the runs find is ``apart``.
    """
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
    grad, out = grad_0, out_0
    if which == 1:
        grad, out = grad_1, out_1
    elif which == 2:
        grad, out = grad_2, out_2
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
    out += split.to(tl.int64) * apart + block.to(tl.int64) * (B * B)
    there = (i < B)[:, None] & (j < B)[None, :]
    tl.store(out + i[:, None] * B + j[None, :], found.to(out.dtype.element_ty), there)


class Shape(NamedTuple):
    """A tile of a result, how much of what is summed is read at a time, and as for `Tiles`."""

    tile: int
    part: int
    step: int
    warps: int
    stages: int


# As measured on one H100.
TURN = Shape(64, 128, 64, 4, 3)
GRAM = Shape(128, 128, 64, 4, 3)


def serves(x: Tensor, core: Tensor, stride: int = 1) -> bool:
    """Whether this is for here: 16-bit activations, wide blocks of neighbours."""
    return x.dtype.itemsize == 2 and core.shape[-1] >= NARROWEST and stride == 1


def turned(x: Tensor, core: Tensor) -> Tensor:
    """A rotation of x (…, n·b) of any strides by a core (n, b, b), contiguous."""
    return _summed([x], [core.to(x.dtype)])


def returned(grads: list[Tensor], cores: list[Tensor]) -> Tensor:
    """The gradient of what was rotated, from those of up to three rotations."""
    return _summed(grads, [core.to(grads[0].dtype).mT for core in cores])


def _summed(sources: list[Tensor], cores: list[Tensor]) -> Tensor:
    out = like(sources[0])
    rows, stride = rows_alike(sources)
    cores, core_strides = alike(cores)
    n, b, _ = cores[0].shape
    strides = (stride, *core_strides)
    _turn_work(_height(out, n, b), n, b, out.dtype, strides, len(cores), out.device)(
        *three(rows), *three(cores), out
    )
    return out


def grams(x: Tensor, grads: list[Tensor], cores: list[Tensor]) -> list[Tensor]:
    """The gradients of up to three cores."""
    outs = [like(core) for core in cores]
    rows, stride = rows_of(x)
    flat, grad_stride = rows_alike(grads)
    n, b, _ = cores[0].shape
    strides = (stride, grad_stride)
    dtypes = (x.dtype, cores[0].dtype)
    work = _gram_work(_height(x, n, b), n, b, dtypes, strides, len(grads), x.device)
    if work.splits == 1:
        work.launch(rows, *three(flat), *three(outs))
        return outs
    shape = (work.splits, len(cores), n, b, b)
    found = torch.empty(shape, dtype=torch.float32, device=x.device)
    work.launch(rows, *three(flat), *three(list(found[0])))
    added(found, *outs)
    return outs


def _height(x: Tensor, n: int, b: int) -> int:
    return x.numel() // (n * b) if n else 0


@functools.lru_cache(maxsize=4096)
def _turn_work(
    rows: int,
    n: int,
    b: int,
    dtype: torch.dtype,
    strides: tuple[int, ...],
    count: int,
    device: torch.device,
) -> Launch:
    tile, part, step, warps, stages = TURN
    programs = triton.cdiv(rows, tile) * n * triton.cdiv(b, part)
    constants = (b, tile, part, step, b % part == 0 and b % step == 0, count)
    numbers = (rows, n, n * b, *strides)
    return Launch(_turn, programs, numbers, constants, num_warps=warps, num_stages=stages)


@functools.lru_cache(maxsize=4096)
def _gram_work(
    rows: int,
    n: int,
    b: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    strides: tuple[int, int],
    count: int,
    device: torch.device,
) -> Work:
    tile, part, step, warps, stages = GRAM
    programs = n * count * triton.cdiv(b, tile) * triton.cdiv(b, part)
    height = triton.cdiv(rows, step)
    # What a run finds is as much as some hundred rows: no more runs than fill the device once.
    wanted = triton.cdiv(height, max(1, processors(device) // max(1, programs)))
    steps = max(1, min(wanted, longest(step, max(*strides, n * b))))
    splits = max(1, triton.cdiv(height, steps))
    constants = (b, tile, part, step, b % tile == 0 and b % part == 0, count)
    numbers = (rows, n, steps, count * n * b * b, *strides)
    launch = Launch(
        _gram, programs * splits, numbers, constants, num_warps=warps, num_stages=stages
    )
    return Work(launch, splits)
