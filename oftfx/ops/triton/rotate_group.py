"""Rotations of one tensor by two or three cores, and their gradients, in one pass each.

As in `rotate`, a program takes a pack of blocks over a run of rows. Here it holds a core for each
rotation: x is read once for all of them, and their gradients are added before anything is written.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.triton import rotate, wide
from oftfx.ops.triton.add import added
from oftfx.ops.triton.blocks import PRECISION, columns_of, diagonal, load_rows, locate, store_gram
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.rotate import LARGEST, largest
from oftfx.ops.triton.tiles import (
    Tiles,
    Work,
    alike,
    cut,
    layout,
    like,
    options,
    rows_alike,
    rows_of,
    three,
    uniform,
)

WIDEST = 64
"""The widest block: of wider ones, three cores and three Gram matrices do not fit a program."""


@triton.jit
def _turned(x: tl.tensor, plain: tl.tensor, turn: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """In float32; x itself never passes through a product."""
    return plain.to(tl.float32) + tl.dot(x, turn, input_precision=PRECISION)


@triton.jit(do_not_specialize=["rows", "n", "tiles"])
def _forward(
    source: tl.tensor,
    core_0: tl.tensor,
    core_1: tl.tensor,
    core_2: tl.tensor,
    out_0: tl.tensor,
    out_1: tl.tensor,
    out_2: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    tiles: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    block: tl.tensor,
    row_step: tl.tensor,
    col_step: tl.tensor,
    B: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    THREE: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """``out_i = source + source·blockdiag(core_i)`` for a part of a pack's columns."""
    _, first, begin, end = locate(rows, n, tiles, PACK, WIDE // PART, TILE)
    whole, whole_in, part, part_in = columns_of(first, n, B, PACK, WIDE, PART, EVEN)
    dtype = source.dtype.element_ty
    shift = first.to(tl.int64) * B
    source += begin * stride + shift
    begins = begin * width + shift
    out_0 += begins
    out_1 += begins
    out_2 += begins
    lane = tl.arange(0, TILE)
    if AHEAD:  # as in `rotate`
        x = load_rows(source, lane, end, stride, whole, whole_in)
    turn_0 = diagonal(core_0, first, n, part, block, row_step, col_step, B, PACK, WIDE, dtype)
    turn_1 = diagonal(core_1, first, n, part, block, row_step, col_step, B, PACK, WIDE, dtype)
    if THREE:
        turn_2 = diagonal(core_2, first, n, part, block, row_step, col_step, B, PACK, WIDE, dtype)

    for start in range(0, end, TILE):
        row = start + lane
        if AHEAD:
            following = load_rows(source, row + TILE, end, stride, whole, whole_in)
        else:
            x = load_rows(source, row, end, stride, whole, whole_in)
        plain = x if PART == WIDE else load_rows(source, row, end, stride, part, part_in)
        place = row[:, None] * width + part[None, :]
        there = (row < end)[:, None] & part_in[None, :]
        tl.store(out_0 + place, _turned(x, plain, turn_0, PRECISION).to(dtype), there)
        tl.store(out_1 + place, _turned(x, plain, turn_1, PRECISION).to(dtype), there)
        if THREE:
            tl.store(out_2 + place, _turned(x, plain, turn_2, PRECISION).to(dtype), there)
        if AHEAD:
            x = following


@triton.jit(do_not_specialize=["rows", "n", "tiles"])
def _backward(
    grad_0: tl.tensor,
    grad_1: tl.tensor,
    grad_2: tl.tensor,
    other: tl.tensor,
    core_0: tl.tensor,
    core_1: tl.tensor,
    core_2: tl.tensor,
    out: tl.tensor,
    gram: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    tiles: tl.tensor,
    width: tl.tensor,
    grad_stride: tl.tensor,
    other_stride: tl.tensor,
    block: tl.tensor,
    row_step: tl.tensor,
    col_step: tl.tensor,
    B: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    THREE: tl.constexpr,
    ROTATE: tl.constexpr,
    GRAM: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """``out = Σ grad_i + grad_i·blockdiag(core_i)`` and ``gram_i = otherᵀ grad_i``, of a pack."""
    tl.static_assert(PART == WIDE)
    split, first, begin, end = locate(rows, n, tiles, PACK, WIDE // PART, TILE)
    whole, whole_in, part, part_in = columns_of(first, n, B, PACK, WIDE, PART, EVEN)
    dtype = grad_0.dtype.element_ty
    shift = first.to(tl.int64) * B
    grad_0 += begin * grad_stride + shift
    grad_1 += begin * grad_stride + shift
    grad_2 += begin * grad_stride + shift
    other += begin * other_stride + shift
    out += begin * width + shift
    lane = tl.arange(0, TILE)
    if ROTATE:
        turn_0 = diagonal(core_0, first, n, part, block, row_step, col_step, B, PACK, WIDE, dtype)
        turn_1 = diagonal(core_1, first, n, part, block, row_step, col_step, B, PACK, WIDE, dtype)
        if THREE:
            turn_2 = diagonal(
                core_2, first, n, part, block, row_step, col_step, B, PACK, WIDE, dtype
            )
    if GRAM:
        total_0 = tl.full((PART, WIDE), 0.0, tl.float32)
        total_1 = tl.full((PART, WIDE), 0.0, tl.float32)
        if THREE:
            total_2 = tl.full((PART, WIDE), 0.0, tl.float32)

    for start in range(0, end, TILE):
        row = start + lane
        g_0 = load_rows(grad_0, row, end, grad_stride, whole, whole_in)
        g_1 = load_rows(grad_1, row, end, grad_stride, whole, whole_in)
        if THREE:
            g_2 = load_rows(grad_2, row, end, grad_stride, whole, whole_in)
        if GRAM:  # before what is waited for, as in `rotate`
            y = tl.trans(load_rows(other, row, end, other_stride, part, part_in))
            total_0 = tl.dot(y, g_0, total_0, input_precision=PRECISION)
            total_1 = tl.dot(y, g_1, total_1, input_precision=PRECISION)
            if THREE:
                total_2 = tl.dot(y, g_2, total_2, input_precision=PRECISION)
        if ROTATE:
            turned = _turned(g_0, g_0, turn_0, PRECISION) + _turned(g_1, g_1, turn_1, PRECISION)
            if THREE:
                turned += _turned(g_2, g_2, turn_2, PRECISION)
            place = out + row[:, None] * width + part[None, :]
            tl.store(place, turned.to(dtype), (row < end)[:, None] & part_in[None, :])

    if GRAM:
        count: tl.constexpr = 3 if THREE else 2
        entries = n.to(tl.int64) * (B * B)
        gram += split * count * entries + first.to(tl.int64) * (B * B)
        store_gram(gram, total_0, whole, whole_in, part, part_in, B)
        store_gram(gram + entries, total_1, whole, whole_in, part, part_in, B)
        if THREE:
            store_gram(gram + 2 * entries, total_2, whole, whole_in, part, part_in, B)


def fits(x: Tensor, cores: Sequence[Tensor], grads: Sequence[Tensor] = ()) -> bool:
    """Whether the kernels take these: two or three rotations alike, each one for `rotate`.

    And their gradients if there are any, of 16 bits: for the parts of several float32 products a
    program lacks registers.
    """
    first = cores[0]
    return (
        2 <= len(cores) <= 3
        and rotate.fits(x, first)
        and (wide.serves(x, first) or _held(x, first))
        and uniform(cores, first.dtype, first.shape)
        and (not grads or (x.dtype.itemsize == 2 and uniform(grads, x.dtype)))
    )


def _held(x: Tensor, core: Tensor) -> bool:
    """Whether a program can hold the cores."""
    return core.shape[-1] <= WIDEST and largest(x.device) == LARGEST


def rotate_group(x: Tensor, cores: list[Tensor]) -> list[Tensor]:
    """`oftfx::rotate_group`: x (..., n·b) of any strides and cores (n, b, b), from one reading."""
    if not _held(x, cores[0]):
        return [rotate.rotate(x, core) for core in cores]
    outs = [like(x) for _ in cores]
    rows, stride = rows_of(x)
    n, b, _ = cores[0].shape
    count = x.numel() // (n * b) if n else 0
    cores, strides = alike(cores)
    work = _work(len(cores), count, n, b, x.dtype, cores[0].dtype, stride, 0, strides, (), x.device)
    work.launch(rows, *three(cores), *three(outs))
    return outs


def rotate_group_grad(
    grads: list[Tensor], x: Tensor, cores: list[Tensor], need_x: bool, need_cores: bool
) -> tuple[Tensor, list[Tensor]]:
    """`oftfx::rotate_group_grad`: all gradients from one reading of ``grads`` and ``x``."""
    grad_x = like(x, wanted=need_x)
    grad_cores = [like(core, wanted=need_cores) for core in cores]
    if not (need_x or need_cores):
        return grad_x, grad_cores
    if not _held(x, cores[0]):
        return (
            wide.returned(grads, cores) if need_x else grad_x,
            wide.grams(x, grads, cores) if need_cores else grad_cores,
        )
    flat, grad_stride = rows_alike(grads)
    x_rows, x_stride = rows_of(x)
    n, b, _ = cores[0].shape
    count = x.numel() // (n * b) if n else 0
    cores, (block, row, col) = alike(cores)
    work = _work(
        len(cores),
        count,
        n,
        b,
        x.dtype,
        cores[0].dtype,
        grad_stride,
        x_stride,
        (block, col, row),  # of Cᵀ
        (need_x, need_cores),
        x.device,
    )
    shape = (work.splits, len(cores), n, b, b) if need_cores else (0,)
    gram = torch.empty(shape, dtype=torch.float32, device=x.device)
    work.launch(*three(flat), x_rows, *three(cores), grad_x, gram)
    if need_cores:
        added(gram, *grad_cores)
    return grad_x, grad_cores


def tiles(b: int, itemsize: int, gradients: bool) -> Tiles:
    """As for one rotation, but with what several Grams keep in registers, as measured."""
    chosen = rotate.tiles(b, itemsize, gradients)
    return chosen._replace(warps=8, waves=1) if gradients and itemsize == 2 else chosen


@functools.lru_cache(maxsize=4096)
def _work(
    count: int,
    rows: int,
    n: int,
    b: int,
    dtype: torch.dtype,
    core_dtype: torch.dtype,
    source_stride: int,
    other_stride: int,
    core_strides: tuple[int, int, int],
    needs: tuple[bool, ...],
    device: torch.device,
) -> Work:
    """Chooses tiles and runs; ``needs`` says which gradients are wanted, and is empty forward."""
    chosen = tiles(b, dtype.itemsize, bool(needs))
    stride = max(source_stride, other_stride, n * b)
    programs, run, splits = cut(rows, n, chosen, device, stride)
    strides = (source_stride, other_stride) if needs else (source_stride,)
    numbers = (rows, n, run, n * b, *strides, *core_strides)
    last: tuple[int | str, ...] = (*needs, PRECISION) if needs else (PRECISION, chosen.stages == 0)
    launch = Launch(
        _backward if needs else _forward,
        programs,
        numbers,
        (*layout(n, b, chosen), count == 3, *last),
        **options(chosen),
    )
    return Work(launch, splits)
