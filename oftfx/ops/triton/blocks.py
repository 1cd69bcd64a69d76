"""What kernels over packs of blocks are made of: where a program is, and what it loads and stores.

A *pack* is several neighbouring blocks, whose columns a program takes for a run of rows (`rotate`).
"""

import triton
import triton.language as tl

PRECISION = "tf32x3"
"""tf32 alone keeps three digits of float32; three products of its parts keep them all."""


@triton.jit
def locate(
    rows: tl.tensor,
    n: tl.tensor,
    tiles: tl.tensor,
    PACK: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A program's run of rows, the first block of its pack, the run's first row and its length."""
    columns = (n + PACK - 1) // PACK * PARTS
    split = tl.program_id(0) // columns
    first = tl.program_id(0) % columns // PARTS * PACK
    begin = split.to(tl.int64) * tiles * TILE
    # Within a run, 32 bits count: see `cut`.
    return split, first, begin, tl.minimum(rows - begin, tiles * TILE).to(tl.int32)


COMPILED = tl.constexpr(isinstance(locate, triton.JITFunction))
"""The interpreter knows neither a GPU's instructions nor CUDA's own functions."""


@triton.jit
def columns_of(
    first: tl.tensor,
    n: tl.tensor,
    B: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,
    EVEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """All columns of the pack, and this program's part of them; which of either there are."""
    whole = tl.arange(0, WIDE)
    part = tl.program_id(0) % (WIDE // PART) * PART + tl.arange(0, PART)
    if EVEN:
        whole_in = whole >= 0
        part_in = part >= 0
    else:
        whole_in = (whole < PACK * B) & (first + whole // B < n)
        part_in = (part < PACK * B) & (first + part // B < n)
    return whole, whole_in, part, part_in


@triton.jit
def diagonal(
    core: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    part: tl.tensor,
    core_block: tl.tensor,
    core_row: tl.tensor,
    core_col: tl.tensor,
    B: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """The given columns of the pack's block-diagonal core, (WIDE, number of columns)."""
    i, j = tl.arange(0, WIDE)[:, None], part[None, :]
    if PACK == 1 and B == WIDE:  # one block, whole
        entry = first.to(tl.int64) * core_block + i * core_row + j * core_col
        turn = tl.load(core + entry)
    else:
        same = (i // B == j // B) & (tl.maximum(i, j) < PACK * B) & (first + i // B < n)
        block = (first + i // B).to(tl.int64) * core_block
        turn = tl.load(core + block + i % B * core_row + j % B * core_col, same, 0.0)
    return turn.to(DTYPE)


@triton.jit
def load_rows(
    start: tl.tensor,
    row: tl.tensor,
    end: tl.tensor,
    stride: tl.tensor,
    column: tl.tensor,
    column_in: tl.tensor,
) -> tl.tensor:
    """Rows before ``end`` of some columns, and zeros after."""
    mask = (row < end)[:, None] & column_in[None, :]
    return tl.load(start + row[:, None] * stride + column[None, :], mask, 0.0)


@triton.jit
def beside(x: tl.tensor, other: tl.tensor) -> tl.tensor:
    """Brings x, float32, into the registers where ``other``, what a product gave, has its own."""
    # Left to choose, Triton computes what it needs in two places twice. Of more columns than four
    # warps multiply, it does so anyway, and has fewer registers for it.
    if COMPILED and x.shape[1] <= 64:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f,f", [x, other], dtype=tl.float32, is_pure=True, pack=1
        )
    return x


@triton.jit
def times(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The bits of PyTorch's product."""
    if COMPILED and a.dtype == tl.float32:
        # LLVM would join it with the subtraction that splits it in parts, and not round it.
        product = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        product = (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)
    return product


@triton.jit
def store_gram(
    slot: tl.tensor,
    total: tl.tensor,
    whole: tl.tensor,
    whole_in: tl.tensor,
    part: tl.tensor,
    part_in: tl.tensor,
    B: tl.constexpr,
) -> None:
    """The blocks on the diagonal of a pack's Gram matrix, one after another."""
    same = (part[:, None] // B == whole[None, :] // B) & part_in[:, None] & whole_in[None, :]
    entry = (whole[None, :] // B) * (B * B) + (part[:, None] % B) * B + whole[None, :] % B
    tl.store(slot + entry, total, same)
