"""4-bit weights to floats, rotated on the way: what is written is ``W blockdiag(I + C)ᵀ``.

The work is bound by the bytes of the float weight, if nothing but those moves. So the order of rows
and columns is chosen such that a thread dequantises the very numbers that tensor cores take from it
and writes the ones they give it back: none of them goes through shared memory or to another thread.

A tile is (lines, 32 columns): the rows of a pack's first 32 columns, then of its next ones, and
so on. Of a line, thread t of four loads bytes 4t … 4t+3, so it has columns 8t … 8t+7. Among the
columns as a product numbers them, it has 2t and 2t+1 of each eight. Rows differ alike: in memory,
warps take eight after each other, in a product sixteen.

Nor does a thread ask memory for the code: each holds one of its 16 numbers, and they tell each
other. Looking numbers up took as long as the product.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.packed import Packed
from oftfx.ops.triton.blocks import COMPILED, PRECISION
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.tiles import processors

WIDTHS = {16, 32, 64, 128}
"""Block widths that it rotates by: packs of them are whole runs of 32 columns."""


@triton.jit
def _scale(
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    nested_code: tl.tensor,
    offset: tl.tensor,
    block: tl.tensor,
    there: tl.tensor,
    NESTED: tl.constexpr,
) -> tl.tensor:
    """The scales of some blocks; rounded after each operation, as bitsandbytes does."""
    if NESTED == 0:
        return tl.load(absmax + block, there, 0.0)
    level = tl.load(nested_code + tl.load(absmax + block, there, 0).to(tl.int32))
    return level * tl.load(nested_absmax + block // NESTED, there, 0.0) + tl.load(offset)


@triton.jit
def _operand(
    x: tl.tensor, RUNS: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr
) -> tl.tensor:
    """Pairs of columns from the order of memory, (runs·rows, 16), to a product's, (rows, …)."""
    x = tl.reshape(x, (RUNS, TILE // (16 * WARPS), 2, WARPS, 8, 4, 4))
    return tl.reshape(tl.permute(x, (1, 3, 2, 4, 0, 6, 5)), (TILE, 16 * RUNS))


@triton.jit
def _memory(x: tl.tensor, RUNS: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr) -> tl.tensor:
    """Columns from a product's order, (rows, 32·runs), to that of memory, (runs·rows, 32)."""
    x = tl.reshape(x, (TILE // (16 * WARPS), WARPS, 2, 8, RUNS, 4, 4, 2))
    return tl.reshape(tl.permute(x, (4, 0, 2, 1, 3, 6, 5, 7)), (RUNS * TILE, 32))


def _tell() -> str:
    """PTX that gives a thread the numbers of its four bytes, first those of their upper halves.

    Lane l holds number l % 16: 0x101f keeps a number's upper half of the lanes among themselves.
    """
    asked = ((4 * half + byte, 8 * byte + 4 - 4 * half) for half in range(2) for byte in range(4))
    steps = (
        f"shr.u32 at, $8, {shift}; shfl.sync.idx.b32 ${number}, $9, at, 0x101f, -1;"
        for number, shift in asked
    )
    return f"{{ .reg .b32 at; {' '.join(steps)} }}"


_TELL = tl.constexpr(_tell())


@triton.jit
def _held(code: tl.tensor) -> tl.tensor:
    """The number that a thread holds of the code; in the interpreter, which has none, the code."""
    if COMPILED:
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1
        )
        code = tl.load(code + lane % 16)
    return code


@triton.jit
def _numbers(held: tl.tensor, stored: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The numbers of the code that bytes stand for: of their upper halves and of their lower."""
    if COMPILED:
        even, odd = tl.inline_asm_elementwise(
            _TELL,
            "=f,=f,=f,=f,=f,=f,=f,=f,r,f,f,f,f",
            [stored, held],
            dtype=(tl.float32, tl.float32),
            is_pure=False,  # it takes all threads of a warp, and so must stay where it is
            pack=4,
        )
    else:
        even, odd = tl.load(held + (stored >> 4)), tl.load(held + (stored & 15))
    return even, odd


@triton.jit
def _diagonal(
    core: tl.tensor,
    first: tl.tensor,
    core_block: tl.tensor,
    core_row: tl.tensor,
    core_col: tl.tensor,
    B: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """The transposed blocks from the ``first`` on, diagonal, columns as a product numbers them."""
    k = tl.arange(0, WIDE)
    column = k // 32 * 32 + k // 2 % 4 * 8 + k // 8 % 4 * 2 + k % 2
    i, j = column[:, None], column[None, :]
    block = (first + i // B).to(tl.int64) * core_block
    entry = block + i % B * core_col + j % B * core_row
    return tl.load(core + entry, i // B == j // B, 0.0).to(DTYPE)


@triton.jit
def _turned(weight: tl.tensor, turn: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """In the residual form: W itself never passes through a product."""
    return weight.to(tl.float32) + tl.dot(weight, turn, input_precision=PRECISION)


@triton.jit(do_not_specialize=["rows", "n", "tiles"])
def _dequantise(
    data: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    nested_absmax: tl.tensor,
    nested_code: tl.tensor,
    offset: tl.tensor,
    core: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    tiles: tl.tensor,
    half: tl.tensor,
    core_block: tl.tensor,
    core_row: tl.tensor,
    core_col: tl.tensor,
    B: tl.constexpr,
    RUNS: tl.constexpr,
    TILE: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    TURN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One pack's columns, over ``tiles`` tiles of rows."""
    packs = n * B // (32 * RUNS)
    pack = tl.program_id(0) % packs
    begin = tl.program_id(0) // packs * tiles * TILE
    end = tl.minimum(begin + tiles * TILE, rows)
    dtype = out.dtype.element_ty
    byte = begin.to(tl.int64) * half + pack * (16 * RUNS)  # the tile's first
    data += byte
    out += 2 * byte
    line = tl.arange(0, RUNS * TILE)
    row = begin + line % TILE
    place = line % TILE * half + line // TILE * 16
    # Four bytes a thread; more would give it columns that a product has elsewhere.
    within = place[:, None] + tl.max_contiguous(tl.arange(0, 16), 4)[None, :]
    # Bytes and scales are asked for a tile ahead, the first ones before the core.
    stored = tl.load(data + within, (row < end)[:, None], 0)
    block = (byte + place) // (BLOCK // 2)  # of 32 columns all are in one
    scale = _scale(absmax, nested_absmax, nested_code, offset, block, row < end, NESTED)
    held = _held(code)
    WIDE: tl.constexpr = 32 if B < 32 else B  # of a product; a pack is one or two of them
    if TURN:
        first = pack * (32 * RUNS // B)
        turn = _diagonal(core, first, core_block, core_row, core_col, B, WIDE, dtype)
        if WIDE < 32 * RUNS:
            first += WIDE // B
            other = _diagonal(core, first, core_block, core_row, core_col, B, WIDE, dtype)

    for _ in range(begin, end, TILE):
        there = (row < end)[:, None]
        row += TILE
        byte += TILE * half
        data += TILE * half
        even, odd = _numbers(held, stored)
        even = (even * scale[:, None]).to(dtype)
        odd = (odd * scale[:, None]).to(dtype)
        stored = tl.load(data + within, (row < end)[:, None], 0)
        block = (byte + place) // (BLOCK // 2)
        scale = _scale(absmax, nested_absmax, nested_code, offset, block, row < end, NESTED)
        if TURN:
            pairs = tl.join(_operand(even, RUNS, TILE, WARPS), _operand(odd, RUNS, TILE, WARPS))
            weight = tl.reshape(pairs, (TILE, 32 * RUNS))
            if WIDE < 32 * RUNS:  # each by itself: as one product they would be mostly zeros
                halves = tl.permute(tl.reshape(weight, (TILE, 2, WIDE)), (0, 2, 1))
                left, right = tl.split(halves)
                both = tl.join(_turned(left, turn, PRECISION), _turned(right, other, PRECISION))
                turned = tl.reshape(tl.permute(both, (0, 2, 1)), (TILE, 2 * WIDE))
            else:
                turned = _turned(weight, turn, PRECISION)
            value = _memory(turned.to(dtype), RUNS, TILE, WARPS)
        else:
            value = tl.reshape(tl.join(even, odd), (RUNS * TILE, 32))
        tl.store(out + 2 * place[:, None] + tl.arange(0, 32)[None, :], value, there)
        out += 2 * TILE * half


_DTYPES = {torch.bfloat16, torch.float16, torch.float32}


def fits(weight: Packed, block: int | None, dtype: torch.dtype) -> bool:
    """Whether the kernel takes these: plain scales, and rotations by blocks of its widths or none.

    There must be a core for every block.
    """
    width = weight.shape[1]
    scale = weight.absmax if weight.nested_absmax is None else weight.nested_absmax
    return (
        dtype in _DTYPES
        and width % 32 == 0
        and weight.block_size % 32 == 0
        and scale.dtype is torch.float32
        and weight.data.is_contiguous()
        and (block is None or (block in WIDTHS and width % block == 0))
    )


def folded(weight: Packed, core: Tensor, dtype: torch.dtype) -> Tensor:
    """``W blockdiag(I + C_1 … I + C_n)ᵀ``, (out, n·b), from one reading of the bytes."""
    return _run(weight, core, core.shape[-1], dtype)


def dequantised(weight: Packed, dtype: torch.dtype) -> Tensor:
    """W, (out, in)."""
    return _run(weight, None, 32, dtype)


def _run(weight: Packed, core: Tensor | None, b: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.data.device)
    nested = weight.nested_absmax is not None
    strides = (0, 0, 0) if core is None else core.stride()
    sizes = (*weight.shape, b, weight.block_size, weight.nested_block_size if nested else 0)
    core_dtype = None if core is None else core.dtype
    launch = _launch(*sizes, dtype, core_dtype, strides, out.device)
    absmax = weight.absmax
    # A kernel of plain scales is given tensors that it does not read.
    rest = (weight.nested_absmax, weight.nested_code, weight.offset)
    given = (absmax if tensor is None else tensor for tensor in rest)
    data = weight.data.view(-1).view(torch.uint8)
    launch(data, absmax, weight.code, *given, out if core is None else core, out)
    return out


class Tiles(NamedTuple):
    """The kernel's choices.

    Attributes:
        runs: Runs of 32 columns in a pack.
        tile: Rows at a time.
        warps: Warps of a program.
        waves: Programs at work at a time on one processor.
    """

    runs: int
    tile: int
    warps: int
    waves: int


def tiles(width: int, b: int, turn: bool) -> Tiles:
    """Tile sizes by the weight's width and that of its blocks, as measured on one H100."""
    if b > 64:
        return Tiles(b // 32, 64, 4, 4)
    return Tiles(1 if width % 64 else 2, 64, 4, 12 if turn else 8)


@functools.lru_cache(maxsize=4096)
def _launch(
    rows: int,
    width: int,
    b: int,
    block_size: int,
    nested: int,
    dtype: torch.dtype,
    core_dtype: torch.dtype | None,
    strides: tuple[int, int, int],
    device: torch.device,
) -> Launch:
    runs, tile, warps, waves = tiles(width, b, core_dtype is not None)
    packs = width // (32 * runs)
    height = triton.cdiv(rows, tile)
    # Equal runs, as many as are at work at a time.
    run = max(1, triton.cdiv(height, max(1, waves * processors(device) // packs)))
    constants = (b, runs, tile, warps, block_size, nested, core_dtype is not None, PRECISION)
    return Launch(
        _dequantise,
        packs * triton.cdiv(height, run),
        (rows, width // b, run, width // 2, *strides),
        constants,
        num_warps=warps,
        num_stages=1,  # a pipeline would copy the scales' code, number by number
        enable_fp_fusion=False,  # scales are rounded after the product and after the sum
    )
