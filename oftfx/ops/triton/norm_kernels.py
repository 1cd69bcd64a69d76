"""A norm and its rotations, on the GPU: `norm_rotate` says what they compute, and launches them."""

import triton
import triton.language as tl

from oftfx.ops.triton.blocks import beside, columns_of, diagonal, load_rows, locate, store_gram


@triton.jit
def _row(numbers: tl.tensor, row: tl.tensor, end: tl.tensor) -> tl.tensor:
    """One float32 number for each row, as a column."""
    return tl.load(numbers + row, row < end, 0.0).to(tl.float32)[:, None]


@triton.jit
def _column(numbers: tl.tensor, column: tl.tensor, column_in: tl.tensor) -> tl.tensor:
    """One float32 number for each column, as a row; zeros where there is no column."""
    return tl.load(numbers + column, column_in, 0.0).to(tl.float32)[None, :]


@triton.jit
def _along(x: tl.tensor) -> tl.tensor:
    """The sum of each row."""
    # `tl.sum`, which the interpreter refuses where triton was imported before it was asked for.
    return tl.reduce(x, 1, tl.standard._sum_combine)


@triton.jit(do_not_specialize=["rows", "n", "tiles"])
def forward(
    source: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
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
    CENTRED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHIFTED: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """All outputs for a pack's columns over a run of rows."""
    tl.static_assert(PART == WIDE)
    _, first, begin, end = locate(rows, n, tiles, PACK, 1, TILE)
    whole, whole_in, _, _ = columns_of(first, n, B, PACK, WIDE, PART, EVEN)
    dtype = out_0.dtype.element_ty
    shift = first.to(tl.int64) * B
    source += begin * stride + shift
    mean += begin
    rstd += begin
    begins = begin * width + shift
    out_0 += begins
    out_1 += begins
    out_2 += begins
    lane = tl.arange(0, TILE)
    if AHEAD:  # as in `rotate`
        x = load_rows(source, lane, end, stride, whole, whole_in)
        r = _row(rstd, lane, end)
    turn_0 = diagonal(core_0, first, n, whole, block, row_step, col_step, B, PACK, WIDE, dtype)
    if COUNT > 1:
        turn_1 = diagonal(core_1, first, n, whole, block, row_step, col_step, B, PACK, WIDE, dtype)
    if COUNT > 2:
        turn_2 = diagonal(core_2, first, n, whole, block, row_step, col_step, B, PACK, WIDE, dtype)
    if WEIGHTED:
        w = _column(weight + shift, whole, whole_in)
    if SHIFTED:
        s = _column(bias + shift, whole, whole_in)

    for start in range(0, end, TILE):
        row = start + lane
        if AHEAD:
            following = load_rows(source, row + TILE, end, stride, whole, whole_in)
            r_following = _row(rstd, row + TILE, end)
        else:
            x = load_rows(source, row, end, stride, whole, whole_in)
            r = _row(rstd, row, end)
        y = x.to(tl.float32)
        if CENTRED:
            y -= _row(mean, row, end)
        y *= r
        if WEIGHTED:
            y *= w
        if SHIFTED:
            y += s
        y = y.to(dtype)
        plain = y.to(tl.float32)
        place = row[:, None] * width + whole[None, :]
        there = (row < end)[:, None] & whole_in[None, :]
        turned = tl.dot(y, turn_0, plain, input_precision=PRECISION)
        tl.store(out_0 + place, turned.to(dtype), there)
        if COUNT > 1:
            turned = tl.dot(y, turn_1, plain, input_precision=PRECISION)
            tl.store(out_1 + place, turned.to(dtype), there)
        if COUNT > 2:
            turned = tl.dot(y, turn_2, plain, input_precision=PRECISION)
            tl.store(out_2 + place, turned.to(dtype), there)
        if AHEAD:
            x = following
            r = r_following


@triton.jit(do_not_specialize=["rows", "n", "tiles"])
def backward(
    grad_0: tl.tensor,
    grad_1: tl.tensor,
    grad_2: tl.tensor,
    source: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    core_0: tl.tensor,
    core_1: tl.tensor,
    core_2: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    gram: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    tiles: tl.tensor,
    width: tl.tensor,
    grad_stride: tl.tensor,
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
    CENTRED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHIFTED: tl.constexpr,
    COUNT: tl.constexpr,
    SAME: tl.constexpr,
    ROTATE: tl.constexpr,
    GRAM: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """All gradients for a pack's columns over a run of rows, and the pack's share of row sums.

    With SAME, the gradients are those of one rotation, by its readers.
    """
    tl.static_assert(PART == WIDE)
    split, first, begin, end = locate(rows, n, tiles, PACK, 1, TILE)
    whole, whole_in, _, _ = columns_of(first, n, B, PACK, WIDE, PART, EVEN)
    dtype = grad_0.dtype.element_ty
    shift = first.to(tl.int64) * B
    begins = begin * grad_stride + shift
    grad_0 += begins
    grad_1 += begins
    grad_2 += begins
    source += begin * stride + shift
    mean += begin
    rstd += begin
    out += begin * width + shift
    packs = (n + PACK - 1) // PACK
    means = sums + packs.to(tl.int64) * rows  # the means' follow those of rstd
    here = (first // PACK).to(tl.int64) * rows + begin  # this pack's
    lane = tl.arange(0, TILE)
    if ROTATE:
        turn_0 = diagonal(core_0, first, n, whole, block, row_step, col_step, B, PACK, WIDE, dtype)
        if COUNT > 1:
            turn_1 = turn_0
            if not SAME:
                turn_1 = diagonal(
                    core_1, first, n, whole, block, row_step, col_step, B, PACK, WIDE, dtype
                )
        if COUNT > 2:
            turn_2 = turn_0
            if not SAME:
                turn_2 = diagonal(
                    core_2, first, n, whole, block, row_step, col_step, B, PACK, WIDE, dtype
                )
    if GRAM:
        found_0 = tl.full((WIDE, WIDE), 0.0, tl.float32)
        if COUNT > 1 and not SAME:
            found_1 = tl.full((WIDE, WIDE), 0.0, tl.float32)
        if COUNT > 2 and not SAME:
            found_2 = tl.full((WIDE, WIDE), 0.0, tl.float32)
    if WEIGHTED:
        w = _column(weight + shift, whole, whole_in)
    if SHIFTED:
        s = _column(bias + shift, whole, whole_in)

    for start in range(0, end, TILE):
        row = start + lane
        g_0 = load_rows(grad_0, row, end, grad_stride, whole, whole_in)
        if COUNT > 1:
            g_1 = load_rows(grad_1, row, end, grad_stride, whole, whole_in)
        if COUNT > 2:
            g_2 = load_rows(grad_2, row, end, grad_stride, whole, whole_in)
        x = load_rows(source, row, end, stride, whole, whole_in).to(tl.float32)
        r = _row(rstd, row, end)
        if CENTRED:
            x -= _row(mean, row, end)
        if ROTATE:
            turned = g_0.to(tl.float32)
            if COUNT > 1:
                turned += g_1.to(tl.float32)
            if COUNT > 2:
                turned += g_2.to(tl.float32)
            turned = tl.dot(g_0, turn_0, turned, input_precision=PRECISION)
            if COUNT > 1:
                turned = tl.dot(g_1, turn_1, turned, input_precision=PRECISION)
            if COUNT > 2:
                turned = tl.dot(g_2, turn_2, turned, input_precision=PRECISION)
            x = beside(x, turned)
            if WEIGHTED:
                turned *= w
            tl.store(sums + here + row, _along(turned * x), row < end)
            turned *= r
            if CENTRED:
                tl.store(means + here + row, -_along(turned), row < end)
            there = (row < end)[:, None] & whole_in[None, :]
            place = row[:, None] * width + whole[None, :]
            tl.store(out + place, turned.to(out.dtype.element_ty), there)
        if GRAM:
            y = x * r
            if WEIGHTED:
                y *= w
            if SHIFTED:
                y += s
            # y comes second, in a buffer of this tile's own: Triton (3.6) waits for such a product.
            # Else it would refill the gradients' buffers while the last product still reads them.
            y = y.to(dtype)
            found_0 = tl.dot(tl.trans(g_0), y, found_0, input_precision=PRECISION)
            if COUNT > 1:
                if SAME:
                    found_0 = tl.dot(tl.trans(g_1), y, found_0, input_precision=PRECISION)
                else:
                    found_1 = tl.dot(tl.trans(g_1), y, found_1, input_precision=PRECISION)
            if COUNT > 2:
                if SAME:
                    found_0 = tl.dot(tl.trans(g_2), y, found_0, input_precision=PRECISION)
                else:
                    found_2 = tl.dot(tl.trans(g_2), y, found_2, input_precision=PRECISION)

    if GRAM:
        count: tl.constexpr = 1 if SAME else COUNT
        entries = n.to(tl.int64) * (B * B)
        gram += split * count * entries + first.to(tl.int64) * (B * B)
        store_gram(gram, tl.trans(found_0), whole, whole_in, whole, whole_in, B)
        if count > 1:
            store_gram(gram + entries, tl.trans(found_1), whole, whole_in, whole, whole_in, B)
        if count > 2:
            store_gram(gram + 2 * entries, tl.trans(found_2), whole, whole_in, whole, whole_in, B)
