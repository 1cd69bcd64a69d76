"""The Givens stages of a row and their gradients, some stages in one pass over the activations.

The first stages stay within *chunks* of columns, the next within chunks of what those leave, their
first columns or *heads*, and so on: a few levels, each like `rotate` of blocks as wide as a chunk.

    level 0      [x_0 … x_63] [x_64 … x_127] …        finished but for x_0, x_64, x_128 …
    level 1      [x_0   x_64   x_128 … ] …            finished but for x_0, x_4096 …

A program puts the stages of a chunk together to one matrix, M = S_1 S_2 …, which tensor cores
multiply with; in the backward their Gram matrix, the gradient of M, is taken apart again.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.triton.blocks import PRECISION
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.tiles import like, processors, rows_of

CHUNK = 64
"""Columns of a chunk, where there are as many."""
TILE = 64
"""Rows at a time. As in `rotate`, fewer would be wrong."""
WAVES = 3
"""Programs at work at a time on one processor."""


@triton.jit
def _stage(
    y: tl.tensor,
    core: tl.tensor,
    coordinate: tl.tensor,
    lane: tl.tensor,
    stage: tl.tensor,
    step: tl.tensor,
    width: tl.tensor,
    BACK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One stage of (rows, W), or its transpose; each column's partner, and which are second."""
    apart = step << stage
    second = coordinate | apart
    paired = ((coordinate & (apart - 1)) == 0) & (second < width)
    is_second = (lane >> stage) & 1
    block = core + _block(second, apart, width)
    own = tl.load(block + 3 * is_second, paired, 0.0).to(tl.float32)
    if BACK:
        other = tl.load(block + 1 + is_second, paired, 0.0).to(tl.float32)
    else:
        other = tl.load(block + 2 - is_second, paired, 0.0).to(tl.float32)
    index = tl.broadcast_to((lane ^ (1 << stage))[None, :], y.shape)
    partner = tl.gather(y, index, 1)
    y += y * own[None, :] + partner * other[None, :]
    return y, partner, (paired & (is_second == 1))[None, :]


@triton.jit
def _block(second: tl.tensor, apart: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Where the block of a pair is, whose coordinates are so far apart.

    ⌈width / apart⌉ coordinates go into its stage; as many blocks as are missing came before.
    """
    return (width - (width + apart - 1) // apart + second // (2 * apart)) * 4


@triton.jit
def _matrix(
    core: tl.tensor,
    coordinate: tl.tensor,
    lane: tl.tensor,
    step: tl.tensor,
    width: tl.tensor,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """``M − I`` of a chunk, (W, W), in float32."""
    eye = (lane[:, None] == lane[None, :]).to(tl.float32)
    y = eye
    for stage in range(STAGES):
        y = _stage(y, core, coordinate, lane, stage, step, width, False)[0]
    return y - eye


@triton.jit
def _down(x: tl.tensor) -> tl.tensor:
    """The sum of each column."""
    # `tl.sum`, which the interpreter refuses where triton was imported before it was asked for.
    return tl.reduce(x, 0, tl.standard._sum_combine)


@triton.jit
def _along(x: tl.tensor) -> tl.tensor:
    """The sum of each row, as a column."""
    return tl.reduce(x, 1, tl.standard._sum_combine)[:, None]


@triton.jit
def _locate(
    rows: tl.tensor, run: tl.tensor, chunks: tl.tensor, W: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A program's run of rows, its begin and end; its chunk, and the columns of that."""
    split = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    begin = split * run
    return split, begin, tl.minimum(begin + run, rows), chunk, chunk * W + tl.arange(0, W)


@triton.jit(do_not_specialize=["rows", "run"])
def _forward(
    source: tl.tensor,
    core: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    rows: tl.tensor,
    run: tl.tensor,
    chunks: tl.tensor,
    step: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
    LAST: tl.constexpr,
    WRITE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """A chunk of the coordinates that are ``step`` apart, which ``source`` holds side by side."""
    W: tl.constexpr = 1 << STAGES
    _, begin, end, chunk, column = _locate(rows, run, chunks, W)
    lane, coordinate = tl.arange(0, W), column * step
    dtype = out.dtype.element_ty
    here = (coordinate < width)[None, :]
    turn = _matrix(core, coordinate, lane, step, width, STAGES).to(dtype)
    head = (lane == 0)[None, :]
    for start in range(begin, end, TILE):
        row = (start + tl.arange(0, TILE))[:, None]
        there = (row < end) & here
        x = tl.load(source + row * stride + column[None, :], there, 0.0)
        # The residual form: x itself never passes through a product.
        y = x.to(tl.float32) + tl.dot(x.to(dtype), turn, input_precision=PRECISION)
        if not LAST:
            tl.store(heads + row * chunks + chunk, _along(tl.where(head, y, 0.0)), row < end)
        if WRITE:  # heads too, which the next level writes over: without them runs are torn apart
            tl.store(out + row * width + coordinate[None, :], y.to(dtype), there)


@triton.jit(do_not_specialize=["rows", "run"])
def _backward(
    grad: tl.tensor,
    source: tl.tensor,
    core: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    gram: tl.tensor,
    rows: tl.tensor,
    run: tl.tensor,
    chunks: tl.tensor,
    step: tl.tensor,
    width: tl.tensor,
    grad_stride: tl.tensor,
    stride: tl.tensor,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
    LAST: tl.constexpr,
    WRITE: tl.constexpr,
    GRAM: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The same chunk's gradients; ``out`` holds those of its coordinates side by side.

    That of its head, where there is a further level, was made there.
    """
    W: tl.constexpr = 1 << STAGES
    split, begin, end, chunk, column = _locate(rows, run, chunks, W)
    lane, coordinate = tl.arange(0, W), column * step
    dtype = grad.dtype.element_ty
    columns = (width + step - 1) // step
    here = (coordinate < width)[None, :]
    head = (lane == 0)[None, :]
    if WRITE:
        turn = tl.trans(_matrix(core, coordinate, lane, step, width, STAGES).to(dtype))
    if GRAM:
        total = tl.full((W, W), 0.0, tl.float32)
    for start in range(begin, end, TILE):
        row = (start + tl.arange(0, TILE))[:, None]
        there = (row < end) & here
        g = tl.load(grad + row * grad_stride + coordinate[None, :], there, 0.0).to(tl.float32)
        if not LAST:
            g = tl.where(head, tl.load(heads + row * chunks + chunk, row < end, 0.0), g)
        if WRITE:
            turned = g + tl.dot(g.to(dtype), turn, input_precision=PRECISION)
            place = out + row * columns + column[None, :]
            tl.store(place, turned.to(out.dtype.element_ty), there)
        if GRAM:
            x = tl.load(source + row * stride + column[None, :], there, 0.0).to(dtype)
            total = tl.dot(tl.trans(x), g.to(dtype), total, input_precision=PRECISION)
    if GRAM:
        # As if the rows of I were what is mapped, and those of the Gram their gradients. What a
        # stage reads of a pair is kept where its second coordinate is, which is no other pair's.
        y = (lane[:, None] == lane[None, :]).to(tl.float32)
        a, b = y, y
        for stage in range(STAGES):
            following, partner, second = _stage(
                y, core, coordinate, lane, stage, step, width, False
            )
            a, b = tl.where(second, partner, a), tl.where(second, y, b)
            y = following
        p, g = total, total
        for back in range(STAGES):
            stage = STAGES - 1 - back
            g, partner, second = _stage(g, core, coordinate, lane, stage, step, width, True)
            p = tl.where(second, partner, p)
        low = tl.maximum(coordinate & -coordinate, 1)
        entry = gram + split * (width - 1) * 4 + _block(coordinate, low, width)
        there = (coordinate < width) & (lane > 0)
        tl.store(entry, _down(a * p), there)
        tl.store(entry + 1, _down(a * total), there)
        tl.store(entry + 2, _down(b * p), there)
        tl.store(entry + 3, _down(b * total), there)


_DTYPES = {torch.bfloat16, torch.float16, torch.float32}


def fits(x: Tensor, core: Tensor) -> bool:
    """Whether the kernels take these: 16- and 32-bit activations, of at least one pair."""
    return x.dtype in _DTYPES and core.dtype is not torch.float64 and len(core) > 0


def givens(x: Tensor, core: Tensor, transposed: bool) -> Tensor:
    """`oftfx::givens`: x (..., d) of any strides and core (d − 1, 2, 2) to a contiguous result."""
    if transposed:
        return _back(x, None, core, True)[0]
    out = like(x)
    _through(x, core.contiguous(), out, True)
    return out


def givens_grad(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    """`oftfx::givens_grad`; the gradients of both from one reading of ``grad`` and two of ``x``."""
    none = grad.new_empty(0)
    if not transposed:
        grad_x, grad_core = _back(grad, x if need_core else None, core, need_x)
    else:
        # ⟨grad, x Mᵀ⟩ = ⟨x, grad M⟩: for the core the two change places.
        grad_x = givens(grad, core, False) if need_x else none
        grad_core = _back(x, grad, core, False)[1] if need_core else none
    return grad_x, grad_core if need_core else core.new_empty(0)


def _through(x: Tensor, core: Tensor, out: Tensor, write: bool) -> list[Tensor]:
    """Maps x level by level; the heads that each level but the last leaves, in float32.

    Those are all that is wanted where nothing is to be written, so the last level is left out.
    """
    source, stride = rows_of(x)
    count, width = _count(x), x.shape[-1]
    left: list[Tensor] = []
    for level in _levels(width):
        if level.last and not write:
            break
        heads = x.new_empty(0 if level.last else count * level.chunks, dtype=torch.float32)
        dtypes = (source.dtype, core.dtype, out.dtype)
        launch = _forward_work(count, width, level, stride, write, dtypes, x.device)
        launch(source, core, out, heads)
        left.append(heads)
        source, stride = heads, level.chunks
    return left


def _back(grad: Tensor, x: Tensor | None, core: Tensor, write: bool) -> tuple[Tensor, Tensor]:
    """The transposed map of ``grad``, and the core's gradient where x is given."""
    out = like(grad, wanted=write)
    rows, grad_stride = rows_of(grad)
    core, count, width = core.contiguous(), _count(grad), grad.shape[-1]
    levels = _levels(width)
    sources, stride, gram = [rows] * len(levels), width, out  # any tensors, where x is not given
    if x is not None:
        source, stride = rows_of(x)
        sources = [source, *_through(x, core, x.new_empty(0), False)]
        splits = _runs(count, levels[0].chunks, x.device)[1]
        gram = torch.empty((splits, *core.shape), dtype=torch.float32, device=x.device)
    heads = out
    for level, source in reversed(list(zip(levels, sources, strict=True))):
        first = level is levels[0]
        to = out if first else out.new_empty(count * level.columns, dtype=torch.float32)
        strides = grad_stride, stride if first else level.columns
        needed = write or not first, x is not None
        dtypes = (grad.dtype, source.dtype, core.dtype, to.dtype)
        launch = _backward_work(count, width, level, strides, needed, dtypes, grad.device)
        launch(rows, source, core, to, heads, gram)
        heads = to
    if x is None:
        return out, gram
    # Runs are added in order, not by atomics: the same input gives the same bits.
    total = gram.sum(0) if len(gram) > 1 else gram[0]
    return out, total.to(core.dtype)


class Level(NamedTuple):
    """Some of the stages.

    Attributes:
        step: How far apart the coordinates are that go into it.
        columns: How many those are.
        stages: How many stages it has at most: a chunk is as wide as 2 to that.
        chunks: How many chunks there are, which leave one coordinate each.
    """

    step: int
    columns: int
    stages: int
    chunks: int

    @property
    def last(self) -> bool:
        """Whether a single coordinate is left."""
        return self.chunks == 1


@functools.cache
def _levels(width: int) -> list[Level]:
    """The levels of a row of this width."""
    levels, step, columns = [], 1, width
    while columns > 1:
        chunk = min(CHUNK, max(16, triton.next_power_of_2(columns)))
        chunks = triton.cdiv(columns, chunk)
        levels.append(Level(step, columns, chunk.bit_length() - 1, chunks))
        step, columns = step * chunk, chunks
    return levels


def _runs(rows: int, chunks: int, device: torch.device) -> tuple[int, int]:
    """Rows of a run, and how many runs make enough programs to keep the memory busy."""
    height = triton.cdiv(rows, TILE)
    tiles = triton.cdiv(height, max(1, WAVES * processors(device) // chunks))
    return tiles * TILE, max(1, triton.cdiv(height, max(1, tiles)))


def _count(x: Tensor) -> int:
    """Rows of x."""
    return x.numel() // x.shape[-1]


@functools.lru_cache(maxsize=4096)
def _forward_work(
    rows: int,
    width: int,
    level: Level,
    stride: int,
    write: bool,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> Launch:
    run, splits = _runs(rows, _levels(width)[0].chunks, device)
    numbers = (rows, run, level.chunks, level.step, width, stride)
    constants = (level.stages, TILE, level.last, write, PRECISION)
    return Launch(_forward, level.chunks * splits, numbers, constants, num_warps=4, num_stages=1)


@functools.lru_cache(maxsize=4096)
def _backward_work(
    rows: int,
    width: int,
    level: Level,
    strides: tuple[int, int],
    needed: tuple[bool, bool],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> Launch:
    run, splits = _runs(rows, _levels(width)[0].chunks, device)
    numbers = (rows, run, level.chunks, level.step, width, *strides)
    constants = (level.stages, TILE, level.last, *needed, PRECISION)
    return Launch(_backward, level.chunks * splits, numbers, constants, num_warps=4, num_stages=1)
