"""Block rotation of the last axis and its gradients, in one pass over the activations.

The work is bound by the bytes of the activations, so a program takes the columns of a *pack*,
several neighbouring blocks, for a run of rows: memory is read in wide pieces, and tensor cores
multiply with the pack's block-diagonal core as if it were dense, which costs no time.

              ── pack ──
             |          |          out = source + source·blockdiag(C)       ROTATE
      rows   | tile     |
             | tile     |          gram_i = other_iᵀ source_i               GRAM
             | …        |          gram_i = (other·by)_iᵀ source_i          GRAM, PRODUCT
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.triton import wide
from oftfx.ops.triton.add import total
from oftfx.ops.triton.blocks import (
    PRECISION,
    columns_of,
    diagonal,
    load_rows,
    locate,
    store_gram,
    times,
)
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.tiles import Tiles, Work, cut, layout, like, options, rows_of

LARGEST = 256
"""The widest block, where a program has as much shared memory as Hopper gives it."""
LARGEST_ELSEWHERE = 64
HELD = 128
"""The widest block whose core a program holds beside a Gram, or while it is in float32."""


@triton.jit
def _place(column: tl.tensor, first: tl.tensor, B: tl.constexpr, STRIDE: tl.constexpr) -> tl.tensor:
    """Where the pack's columns are, counted from those of block ``first``.

    Of blocks that are two runs of B/2 coordinates, STRIDE runs apart.
    """
    place = column
    if STRIDE > 1:
        HALF: tl.constexpr = B // 2
        run = 2 * first + column // HALF
        group = run // (2 * STRIDE) * (2 * STRIDE)
        run = group + run % 2 * STRIDE + (run - group) // 2
        place = (run - 2 * first) * HALF + column % HALF
    return place


@triton.jit
def _factor(
    other: tl.tensor,
    by: tl.tensor,
    row: tl.tensor,
    end: tl.tensor,
    stride: tl.tensor,
    by_stride: tl.tensor,
    column: tl.tensor,
    column_in: tl.tensor,
    PRODUCT: tl.constexpr,
) -> tl.tensor:
    """A tile of what was rotated: of a tensor, or of the product of two."""
    y = load_rows(other, row, end, stride, column, column_in)
    if PRODUCT:
        y = times(y, load_rows(by, row, end, by_stride, column, column_in))
    return y


@triton.jit
def _add_gram(
    found: tl.tensor, x: tl.tensor, y: tl.tensor, PRODUCT: tl.constexpr, PRECISION: tl.constexpr
) -> tl.tensor:
    """``found + yᵀ x``; of a product ``found + xᵀ y``."""
    if PRODUCT:  # the other way around, the factors would miss Triton's pipeline
        found = tl.dot(tl.trans(x), y, found, input_precision=PRECISION)
    else:
        found = tl.dot(tl.trans(y.to(x.dtype)), x, found, input_precision=PRECISION)
    return found


@triton.jit(do_not_specialize=["rows", "n", "tiles"])
def _pass(
    source: tl.tensor,
    other: tl.tensor,
    by: tl.tensor,
    core: tl.tensor,
    out: tl.tensor,
    gram: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    tiles: tl.tensor,
    width: tl.tensor,
    source_stride: tl.tensor,
    other_stride: tl.tensor,
    by_stride: tl.tensor,
    core_block: tl.tensor,
    core_row: tl.tensor,
    core_col: tl.tensor,
    B: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    ROTATE: tl.constexpr,
    GRAM: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
    STRIDE: tl.constexpr,
) -> None:
    """One part of a pack's columns, over ``tiles`` tiles of rows."""
    split, first, begin, end = locate(rows, n, tiles, PACK, WIDE // PART, TILE)
    dtype = source.dtype.element_ty
    whole, whole_in, part, part_in = columns_of(first, n, B, PACK, WIDE, PART, EVEN)
    shift = first.to(tl.int64) * B
    source += begin * source_stride + shift
    other += begin * other_stride + shift
    by += begin * by_stride + shift
    out += begin * width + shift
    whole_at = _place(whole, first, B, STRIDE)
    part_at = _place(part, first, B, STRIDE)
    lane = tl.arange(0, TILE)
    if AHEAD:  # asked for before the core, so that the two wait for memory together
        x = load_rows(source, lane, end, source_stride, whole_at, whole_in)
    if ROTATE:
        turn = diagonal(core, first, n, part, core_block, core_row, core_col, B, PACK, WIDE, dtype)
    if GRAM:
        found = tl.full((WIDE, PART) if PRODUCT else (PART, WIDE), 0.0, tl.float32)
    # The product that is waited for comes last: Triton (3.6) would refill x's buffer while the Gram
    # still reads it. In float32, whose products are waited for, a program lacks the registers.
    GRAM_FIRST: tl.constexpr = dtype.primitive_bitwidth == 16

    for start in range(0, end, TILE):
        row = start + lane
        if AHEAD:
            following = load_rows(source, row + TILE, end, source_stride, whole_at, whole_in)
        else:  # Triton's pipeline asks for it some tiles before
            x = load_rows(source, row, end, source_stride, whole_at, whole_in)
        if GRAM and GRAM_FIRST:
            y = _factor(other, by, row, end, other_stride, by_stride, part_at, part_in, PRODUCT)
            found = _add_gram(found, x, y, PRODUCT, PRECISION)
        if ROTATE:
            plain = (
                x if PART == WIDE else load_rows(source, row, end, source_stride, part_at, part_in)
            )
            # The residual form: x itself never passes through a product.
            turned = plain.to(tl.float32) + tl.dot(x, turn, input_precision=PRECISION)
            place = out + row[:, None] * width + part_at[None, :]
            tl.store(place, turned.to(dtype), (row < end)[:, None] & part_in[None, :])
        if GRAM and not GRAM_FIRST:
            y = _factor(other, by, row, end, other_stride, by_stride, part_at, part_in, PRODUCT)
            found = _add_gram(found, x, y, PRODUCT, PRECISION)
        if AHEAD:
            x = following

    if GRAM:
        if PRODUCT:
            found = tl.trans(found)
        slot = (split.to(tl.int64) * n + first) * (B * B)
        store_gram(gram + slot, found, whole, whole_in, part, part_in, B)


_DTYPES = {torch.bfloat16, torch.float16, torch.float32}


def fits(x: Tensor, core: Tensor, stride: int = 1) -> bool:
    """Whether the kernel takes these: 16- and 32-bit activations, blocks that fit the device.

    And a core for every block: one that all blocks share is left to PyTorch.
    """
    n, b, _ = core.shape
    served = b <= largest(x.device) or wide.serves(x, core, stride)
    return x.dtype in _DTYPES and served and x.shape[-1] == n * b


@functools.cache
def largest(device: torch.device) -> int:
    """The widest block on a device."""
    if device.type != "cuda":  # the interpreter
        return LARGEST
    properties = torch.cuda.get_device_properties(device)
    room = properties.shared_memory_per_block_optin  # type: ignore[attr-defined] # a stub's gap
    return LARGEST if room >= 227 * 1024 else LARGEST_ELSEWHERE


def rotate(x: Tensor, core: Tensor, stride: int = 1) -> Tensor:
    """`oftfx::rotate`: x (..., n·b) of any strides and core (n, b, b) to a contiguous result."""
    if wide.serves(x, core, stride) and core.shape[-1] > largest(x.device):
        return wide.turned(x, core)
    if core.shape[-1] > HELD and x.dtype.itemsize == 2:
        core = core.to(x.dtype)
    out = like(x)
    rows, step = rows_of(x)
    n, b, _ = core.shape
    count = x.numel() // (n * b) if n else 0
    sizes, steps = (count, n, b, stride), (step, step, step)
    needs = (True, False, False)
    work = _work(sizes, x.dtype, core.dtype, steps, core.stride(), needs, x.device)
    work.launch(rows, rows, rows, core, out, out)
    return out


def rotate_grad(
    grad: Tensor,
    x: Tensor,
    core: Tensor,
    need_x: bool,
    need_core: bool,
    stride: int = 1,
    by: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`oftfx::rotate_grad`: both gradients from one reading of ``grad`` and ``x``.

    With ``by``, of x's shape and dtype, what was rotated is their product.
    """
    if _widest(x, core, stride):
        return _in_parts(grad, x, core, need_x, need_core)
    grad_x, gram = shares(grad, x, core, need_x, need_core, stride, by)
    return grad_x, total(gram, core.dtype) if need_core else core.new_empty(0)


def shares(
    grad: Tensor,
    x: Tensor,
    core: Tensor,
    need_x: bool,
    need_core: bool,
    stride: int = 1,
    by: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `rotate_grad` gives, but the core's gradient as its runs find it.

    That is (runs, n, b, b), float32.
    """
    if _widest(x, core, stride):
        grad_x, whole = _in_parts(grad, x, core, need_x, need_core)
        return grad_x, whole[None].float()
    grad_x = like(x, wanted=need_x)
    if not (need_x or need_core):
        return grad_x, core.new_empty(0)
    work, rows = _cut(grad, x, core, (need_x, need_core), stride, by)
    shape = (work.splits, *core.shape) if need_core else (0,)
    gram = torch.empty(shape, dtype=torch.float32, device=grad.device)
    work.launch(*rows, core, grad_x, gram)
    return grad_x, gram


def _in_parts(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool
) -> tuple[Tensor, Tensor]:
    """Each gradient by a kernel of its own."""
    return (
        rotate(grad, core.mT) if need_x else grad.new_empty(0),
        wide.grams(x, [grad], [core])[0] if need_core else core.new_empty(0),
    )


def runs(grad: Tensor, x: Tensor, core: Tensor, need_x: bool, stride: int = 1) -> int:
    """How many `shares` there are of these tensors, which may be fake."""
    return 1 if _widest(x, core, stride) else _cut(grad, x, core, (need_x, True), stride)[0].splits


def _widest(x: Tensor, core: Tensor, stride: int) -> bool:
    """Whether no program holds a core beside its Gram, which `wide` then makes."""
    return wide.serves(x, core, stride) and core.shape[-1] > min(HELD, largest(x.device))


def _cut(
    grad: Tensor,
    x: Tensor,
    core: Tensor,
    needs: tuple[bool, bool],
    stride: int,
    by: Tensor | None = None,
) -> tuple[Work, tuple[Tensor, ...]]:
    """The work of both gradients, and what it reads row by row."""
    grad_rows, grad_step = rows_of(grad)
    x_rows, x_step = rows_of(x)
    by_rows, by_step = (x_rows, x_step) if by is None else rows_of(by)
    n, b, _ = core.shape
    count = x.numel() // (n * b) if n else 0
    block, row, col = core.stride()
    turned = (block, col, row)  # of Cᵀ
    sizes, steps = (count, n, b, stride), (grad_step, x_step, by_step)
    flags = (*needs, needs[1] and by is not None)
    work = _work(sizes, x.dtype, core.dtype, steps, turned, flags, x.device)
    return work, (grad_rows, x_rows, by_rows)


def tiles(b: int, itemsize: int, gram: bool, turn: bool = True) -> Tiles:
    """Tile sizes by block width and what is made, as measured on one H100."""
    pack = max(1, (64 if itemsize == 2 else 32) // b)
    wide = max(16, triton.next_power_of_2(pack * b))
    if itemsize == 4:  # three products of tf32 parts, held beside each other
        return Tiles(pack, wide, min(wide, 32), 64 if wide <= 64 else 32, 4, 2, 8)
    # Never fewer than 64 rows: below, the product of the rotation and that of the Gram need
    # different instructions, and Triton (3.6) refills a buffer that the Gram still reads.
    if wide > 64:
        return Tiles(pack, wide, 128 if gram else wide, 64, 8, 3, 1)
    if not gram:
        return Tiles(pack, wide, wide, 64, 4, 0, 0)
    return Tiles(pack, wide, wide, 64, 4, 3, 2) if turn else Tiles(pack, wide, wide, 64, 8, 2, 3)


@functools.lru_cache(maxsize=4096)
def _work(
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    core_dtype: torch.dtype,
    row_strides: tuple[int, int, int],
    core_strides: tuple[int, int, int],
    needs: tuple[bool, bool, bool],
    device: torch.device,
) -> Work:
    """Chooses tiles, and runs of rows that make enough programs to keep the memory busy.

    Sizes are the rows, the number of blocks, their width and their stride; needs are the kernel's
    ROTATE, GRAM and PRODUCT.
    """
    rows, n, b, stride = sizes
    turn, gram, _ = needs
    chosen = tiles(b, dtype.itemsize, gram, turn)
    programs, run, splits = cut(rows, n, chosen, device, max(*row_strides, n * b))
    last: tuple[int | str, ...] = (*needs, PRECISION, chosen.stages == 0, stride)
    numbers = (rows, n, run, n * b, *row_strides, *core_strides)
    constants = (*layout(n, b, chosen), *last)
    launch = Launch(_pass, programs, numbers, constants, **options(chosen))
    return Work(launch, splits)
