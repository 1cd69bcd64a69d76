"""4-bit weights to floats, rotated on the way: what is written is ``W blockdiag(I + C)ᵀ``.

The work is bound by the bytes of the float weight. A program takes the columns of a pack of blocks
for a run of rows, as in `rotate`; the two numbers of a byte stay apart until they are stored:

    bytes (rows, wide/2)  →  even, odd columns of W (rows, wide/2 each)
    even of W̃ = even + even·Cᵀ[even, even] + odd·Cᵀ[odd, even], and the odd ones likewise
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.packed import Packed
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.rotate import PRECISION, processors

WIDTHS = {16, 32, 64, 128}
"""Block widths that it rotates by: two halves of a pack, each as wide as a product needs."""


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
def _core_part(
    core: tl.tensor,
    first: tl.tensor,
    n: int,
    block: int,
    row_step: int,
    col_step: int,
    ROW: tl.constexpr,
    COL: tl.constexpr,
    B: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Every other row and column of a pack's block-diagonal Cᵀ, (HALF, HALF)."""
    i = 2 * tl.arange(0, HALF)[:, None] + ROW
    j = 2 * tl.arange(0, HALF)[None, :] + COL
    same = (i // B == j // B) & (first + i // B < n)
    place = (first + i // B).to(tl.int64) * block + i % B * col_step + j % B * row_step
    return tl.load(core + place, same, 0.0).to(DTYPE)


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
    rows: int,
    n: int,
    tiles: int,
    half: int,
    core_block: int,
    core_row: int,
    core_col: int,
    B: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_ROW: tl.constexpr,
    NESTED: tl.constexpr,
    TURN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One pack's columns, over ``tiles`` tiles of rows."""
    HALF: tl.constexpr = WIDE // 2
    packs = (n * B + WIDE - 1) // WIDE
    pack = tl.program_id(0) % packs
    first = pack * (WIDE // B)
    begin = (tl.program_id(0) // packs).to(tl.int64) * tiles * TILE
    end = tl.minimum(begin + tiles * TILE, rows)
    dtype = out.dtype.element_ty
    pair = pack * HALF + tl.arange(0, HALF)
    pair_in = pair >= 0 if EVEN else pair < half
    both = pack * WIDE + tl.arange(0, WIDE)
    both_in = both >= 0 if EVEN else both < 2 * half
    lane = tl.arange(0, TILE)
    # The bytes are asked for a tile ahead, the first ones before the core.
    row = begin + lane
    there = (row < end)[:, None] & pair_in[None, :]
    stored = tl.load(data + row[:, None] * half + pair[None, :], there, 0)
    if TURN:
        strides = (core_block, core_row, core_col)
        ee = _core_part(core, first, n, *strides, 0, 0, B, HALF, dtype)
        eo = _core_part(core, first, n, *strides, 0, 1, B, HALF, dtype)
        oe = _core_part(core, first, n, *strides, 1, 0, B, HALF, dtype)
        oo = _core_part(core, first, n, *strides, 1, 1, B, HALF, dtype)

    for start in range(begin, end, TILE):
        row = start + lane
        there = (row < end)[:, None] & pair_in[None, :]
        ahead = (row + TILE < end)[:, None] & pair_in[None, :]
        following = tl.load(data + (row + TILE)[:, None] * half + pair[None, :], ahead, 0)
        if BY_ROW:  # a pack lies within one block of each row
            block = (row * half + pack * HALF) // (BLOCK // 2)
            scale = _scale(absmax, nested_absmax, nested_code, offset, block, row < end, NESTED)[
                :, None
            ]
        else:
            block = (row[:, None] * half + pair[None, :]) // (BLOCK // 2)
            scale = _scale(absmax, nested_absmax, nested_code, offset, block, there, NESTED)
        number = stored.to(tl.int32)
        even = (tl.load(code + (number >> 4)) * scale).to(dtype)
        odd = (tl.load(code + (number & 15)) * scale).to(dtype)
        if TURN:  # the residual form: W itself never passes through a product
            turned = tl.dot(even, ee, input_precision=PRECISION)
            turned = tl.dot(odd, oe, turned, input_precision=PRECISION)
            other = tl.dot(even, eo, input_precision=PRECISION)
            other = tl.dot(odd, oo, other, input_precision=PRECISION)
            even = (even.to(tl.float32) + turned).to(dtype)
            odd = (odd.to(tl.float32) + other).to(dtype)
        place = out + row[:, None] * (2 * half) + both[None, :]
        side_by_side = tl.reshape(tl.join(even, odd), (TILE, WIDE))
        tl.store(place, side_by_side, (row < end)[:, None] & both_in[None, :])
        stored = following


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
        and weight.block_size % 2 == 0
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
    launch(
        weight.data.view(-1).view(torch.uint8),
        absmax,
        weight.code,
        *given,
        out if core is None else core,
        out,
    )
    return out


class Tiles(NamedTuple):
    """The kernel's choices.

    Attributes:
        wide: Columns of a pack.
        tile: Rows at a time.
        warps: Warps of a program.
        waves: Programs at work at a time on one processor.
    """

    wide: int
    tile: int
    warps: int
    waves: int


def tiles(b: int, itemsize: int) -> Tiles:
    """Tile sizes by block width."""
    wide = max(b, 64)
    if itemsize == 4:  # three products of tf32 parts, held beside each other
        return Tiles(max(b, 32), 32, 4, 4)
    return Tiles(wide, 64, 4, 4)


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
    wide, tile, warps, waves = tiles(b, dtype.itemsize)
    n = width // b
    packs = triton.cdiv(width, wide)
    height = triton.cdiv(rows, tile)
    # Equal runs, as many as are at work at a time.
    run = triton.cdiv(height, max(1, waves * processors(device) // packs))
    by_row = width % block_size == 0 and block_size % wide == 0
    constants = (b, wide, tile, width % wide == 0, block_size, by_row, nested)
    return Launch(
        _dequantise,
        packs * triton.cdiv(height, max(1, run)),
        (rows, n, run, width // 2, *strides),
        (*constants, core_dtype is not None, PRECISION),
        num_warps=warps,
        num_stages=1,  # Triton's pipeline would copy numbers of the code to shared memory, singly
        enable_fp_fusion=False,  # scales are rounded after the product and after the sum
    )
