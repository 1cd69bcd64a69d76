"""Block rotation of the last axis and its gradients, in one pass over the activations.

The work is bound by the bytes of the activations, so a program takes the columns of a *pack*,
several neighbouring blocks, for a run of rows: memory is read in wide pieces, and tensor cores
multiply with the pack's block-diagonal core as if it were dense, which costs no time.

              ── pack ──
             |          |          out = source + source·blockdiag(C)       ROTATE
      rows   | tile     |
             | tile     |          gram_i = other_iᵀ source_i               GRAM
             | …        |
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 256
"""The widest block."""


@triton.jit(do_not_specialize=["rows", "n", "tiles"])
def _pass(
    source: tl.tensor,
    other: tl.tensor,
    core: tl.tensor,
    out: tl.tensor,
    gram: tl.tensor,
    rows: int,
    n: int,
    tiles: int,
    width: int,
    source_stride: int,
    other_stride: int,
    core_block: int,
    core_row: int,
    core_col: int,
    B: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    ROTATE: tl.constexpr,
    GRAM: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One part of a pack's columns, over ``tiles`` tiles of rows."""
    parts: tl.constexpr = WIDE // PART
    packs = (n + PACK - 1) // PACK
    split = tl.program_id(0) // (packs * parts)
    place = tl.program_id(0) % (packs * parts)
    first = place // parts * PACK
    dtype = source.dtype.element_ty

    # Columns of the pack (all of them) and of this program's part of it.
    whole = tl.arange(0, WIDE)
    part = place % parts * PART + tl.arange(0, PART)
    column = first.to(tl.int64) * B
    if EVEN:
        whole_in = whole >= 0
        part_in = part >= 0
    else:
        whole_in = (whole < PACK * B) & (first + whole // B < n)
        part_in = (part < PACK * B) & (first + part // B < n)

    if ROTATE:
        same = (whole[:, None] // B == part[None, :] // B) & whole_in[:, None] & part_in[None, :]
        entry = (whole[:, None] % B) * core_row + (part[None, :] % B) * core_col
        block = (first + whole[:, None] // B).to(tl.int64) * core_block
        turn = tl.load(core + block + entry, same, 0.0).to(dtype)
    if GRAM:
        total = tl.zeros((PART, WIDE), tl.float32)

    begin = split.to(tl.int64) * tiles * TILE
    end = tl.minimum(begin + tiles * TILE, rows)
    source += column
    out += column
    other += column
    for start in range(begin, end, TILE):
        row = start + tl.arange(0, TILE)
        row_in = row < end
        x = tl.load(
            source + row[:, None] * source_stride + whole[None, :],
            row_in[:, None] & whole_in[None, :],
            0.0,
        )
        mask = row_in[:, None] & part_in[None, :]
        if ROTATE:
            if PART == WIDE:
                plain = x
            else:
                plain = tl.load(source + row[:, None] * source_stride + part[None, :], mask, 0.0)
            # The residual form: x itself never passes through a product.
            turned = plain.to(tl.float32) + tl.dot(x, turn, input_precision=PRECISION)
            tl.store(out + row[:, None] * width + part[None, :], turned.to(dtype), mask)
        if GRAM:
            y = tl.load(other + row[:, None] * other_stride + part[None, :], mask, 0.0)
            total = tl.dot(tl.trans(y.to(dtype)), x, total, input_precision=PRECISION)

    if GRAM:
        same = (part[:, None] // B == whole[None, :] // B) & part_in[:, None] & whole_in[None, :]
        slot = (split.to(tl.int64) * n + first) * (B * B)
        entry = (whole[None, :] // B) * (B * B) + (part[:, None] % B) * B + whole[None, :] % B
        tl.store(gram + slot + entry, total, same)


_DTYPES = {torch.bfloat16, torch.float16, torch.float32}


def fits(x: Tensor, core: Tensor) -> bool:
    """Whether the kernel takes these: 16- and 32-bit activations, blocks up to 256 wide."""
    return x.dtype in _DTYPES and core.shape[-1] <= LARGEST


def rotate(x: Tensor, core: Tensor) -> Tensor:
    """`oftfx::rotate`: x (..., n·b) of any strides and core (n, b, b) to a contiguous result."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cut = _cut_for(x, core, True, False)
    x, stride = _rows(x)
    block, row, col = core.stride()
    _launch(cut, x, x, core, out, out, stride, stride, block, row, col)
    return out


def rotate_grad(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool
) -> tuple[Tensor, Tensor]:
    """`oftfx::rotate_grad`: both gradients from one reading of ``grad`` and ``x``."""
    grad_x = torch.empty(x.shape if need_x else 0, dtype=grad.dtype, device=grad.device)
    if not (need_x or need_core):
        return grad_x, core.new_empty(0)
    cut = _cut_for(grad, core, need_x, need_core)
    shape = (cut.splits, *core.shape) if need_core else (0,)
    partial = torch.empty(shape, dtype=torch.float32, device=grad.device)
    grad, grad_stride = _rows(grad)
    x, x_stride = _rows(x)
    block, row, col = core.stride()  # and Cᵀ has them the other way round
    _launch(cut, grad, x, core, grad_x, partial, grad_stride, x_stride, block, col, row)
    if not need_core:
        return grad_x, core.new_empty(0)
    # Runs are added in order, not by atomics: the same input gives the same bits.
    total = partial.sum(0) if cut.splits > 1 else partial[0]
    return grad_x, total.to(core.dtype)


class Tiles(NamedTuple):
    """The kernel's compile-time choices for a block size.

    Attributes:
        pack: Blocks in a pack.
        wide: Columns of a pack, padded to a power of two.
        part: How many of those columns one program writes.
        tile: Rows at a time.
        warps: Warps of a program.
        stages: Tiles in flight.
        waves: Programs wanted per processor.
    """

    pack: int
    wide: int
    part: int
    tile: int
    warps: int
    stages: int
    waves: int


class Cut(NamedTuple):
    """How one problem is cut into programs.

    Attributes:
        grid: The number of programs.
        splits: Into how many runs the rows are cut.
        arguments: The kernel's sizes: rows, n, the tiles of a run and the width.
        constants: Its compile-time arguments, warps and stages.
    """

    grid: tuple[int]
    splits: int
    arguments: tuple[int, int, int, int]
    constants: dict[str, Any]


def tiles(b: int, itemsize: int, rotate: bool, gram: bool) -> Tiles:
    """Tile sizes by block width, as measured by ``benchmarks/kernels.py``."""
    target = 64 if itemsize == 2 else 32
    pack = max(1, target // b)
    wide = max(16, triton.next_power_of_2(pack * b))
    if itemsize == 4:  # three products of tf32 parts, held beside each other
        return Tiles(pack, wide, min(wide, 32), 32 if wide > 64 else 64, 4, 2, 8)
    if wide > 128:
        return Tiles(pack, wide, 64, 64, 8, 2, 4)
    return Tiles(pack, wide, wide, 128 if wide < 128 else 64, 4, 3, 4 if gram else 8)


@functools.lru_cache(maxsize=4096)
def cut(
    rows: int, n: int, b: int, itemsize: int, rotate: bool, gram: bool, device: torch.device
) -> Cut:
    """Chooses tiles, and runs of rows that make enough programs to keep the memory busy."""
    pack, wide, part, tile, warps, stages, waves = tiles(b, itemsize, rotate, gram)
    tile = min(tile, max(16, triton.next_power_of_2(rows)))
    columns = triton.cdiv(n, pack) * (wide // part)
    height = triton.cdiv(rows, tile)
    run = max(1, height * columns // (waves * _processors(device)))
    splits = max(1, triton.cdiv(height, run))
    constants = {
        "B": b,
        "PACK": pack,
        "WIDE": wide,
        "PART": part,
        "TILE": tile,
        "EVEN": pack * b == wide and n % pack == 0,
        "ROTATE": rotate,
        "GRAM": gram,
        # tf32 alone keeps three digits; three products of its parts keep float32's.
        "PRECISION": "tf32x3",
        "num_warps": warps,
        "num_stages": stages,
    }
    return Cut((columns * splits,), splits, (rows, n, run, n * b), constants)


def _cut_for(x: Tensor, core: Tensor, rotate: bool, gram: bool) -> Cut:
    n, b, _ = core.shape
    rows = x.numel() // (n * b) if n else 0
    return cut(rows, n, b, x.itemsize, rotate, gram, x.device)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """Rows of neighbouring columns and their stride; a copy only where x has no such view."""
    width = x.shape[-1]
    if x.is_contiguous():
        return x, width
    x = x.reshape(-1, width)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(cut: Cut, *arguments: Any) -> None:
    """Arguments: source, other, core, out, gram, the strides of source and other, and core's."""
    source, other, core, out, gram, *strides = arguments
    _pass[cut.grid](source, other, core, out, gram, *cut.arguments, *strides, **cut.constants)
