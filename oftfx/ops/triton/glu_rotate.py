"""A gated MLP's product and its rotation in one pass, and all their gradients in another.

As in `rotate`, a program takes a pack of blocks over a run of rows. What it multiplies with the
core it makes itself, from gate and up, so that the rotation costs no pass over the activations.

    forward     h = act(gate)·up        out = h + h·blockdiag(C)
    backward    h, act', as above       dh = grad + grad·blockdiag(Cᵀ)      gram_i = h_iᵀ grad_i
                dgate = dh·up·act'      dup = dh·act(gate)
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.glu_rotate import ACTIVATIONS
from oftfx.ops.triton import rotate
from oftfx.ops.triton.add import total
from oftfx.ops.triton.blocks import (
    COMPILED,
    PRECISION,
    beside,
    columns_of,
    diagonal,
    load_rows,
    locate,
    store_gram,
)
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.tiles import Tiles, Work, cut, layout, like, options, rows_of

WIDEST = 128
"""The widest block: beside the core of a wider one, there is no room for two operands more."""

_LOGISTIC = tl.constexpr(
    "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; "  # −log₂ e
    "add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }"
)


@triton.jit
def _logistic(x: tl.tensor) -> tl.tensor:
    """1 / (1 + e⁻ˣ), half of whose instructions otherwise care for numbers it never meets."""
    if COMPILED:
        share = tl.inline_asm_elementwise(
            _LOGISTIC, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        share = 1.0 / (1.0 + tl.exp(-x))
    return share


@triton.jit
def _activated(x: tl.tensor, ACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """An activation and its slope, in float32."""
    if ACT == "silu":
        share = _logistic(x)
        value = x * share
        slope = share + (value - value * share)
    elif ACT == "gelu_tanh":  # (1 + tanh z) / 2 is the logistic function of 2z
        share = _logistic(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        slope = share * (1.0 + x * (1.0 - share) * inner)
        value = x * share
    elif ACT == "gelu":
        share = 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        value = x * share
    elif ACT == "relu":
        slope = tl.where(x > 0.0, 1.0, 0.0)
        value = tl.where(x < 0.0, 0.0, x)
    else:
        tl.static_assert(ACT == "relu2")
        slope = tl.where(x < 0.0, 0.0, 2.0 * x)
        value = slope * slope * 0.25
    return value, slope


@triton.jit
def _product(
    x: tl.tensor, up: tl.tensor, ACT: tl.constexpr, GATED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """act(x)·up and act(x), rounded where a model rounds them, to up's dtype, and the slope."""
    value, slope = _activated(x, ACT)
    value = value.to(up.dtype)
    product = value
    if GATED:
        product = (value.to(tl.float32) * up.to(tl.float32)).to(up.dtype)
    return product, value.to(tl.float32), slope


@triton.jit(do_not_specialize=["rows", "n", "tiles"])
def _forward(
    gate: tl.tensor,
    up: tl.tensor,
    core: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    tiles: tl.tensor,
    width: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    core_block: tl.tensor,
    core_row: tl.tensor,
    core_col: tl.tensor,
    B: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """One part of a pack's columns, over ``tiles`` tiles of rows."""
    _, first, begin, end = locate(rows, n, tiles, PACK, WIDE // PART, TILE)
    dtype = gate.dtype.element_ty
    whole, whole_in, part, part_in = columns_of(first, n, B, PACK, WIDE, PART, EVEN)
    shift = first.to(tl.int64) * B
    gate += begin * gate_stride + shift
    up += begin * up_stride + shift
    out += begin * width + shift
    lane = tl.arange(0, TILE)
    if AHEAD:  # as in `rotate`
        x = load_rows(gate, lane, end, gate_stride, whole, whole_in)
        y = load_rows(up, lane, end, up_stride, whole, whole_in) if GATED else x
    turn = diagonal(core, first, n, part, core_block, core_row, core_col, B, PACK, WIDE, dtype)

    for start in range(0, end, TILE):
        row = start + lane
        if AHEAD:
            next_x = load_rows(gate, row + TILE, end, gate_stride, whole, whole_in)
            next_y = next_x
            if GATED:
                next_y = load_rows(up, row + TILE, end, up_stride, whole, whole_in)
        else:
            x = load_rows(gate, row, end, gate_stride, whole, whole_in)
            y = load_rows(up, row, end, up_stride, whole, whole_in) if GATED else x
        h, value, slope = _product(x.to(tl.float32), y, ACT, GATED)
        plain = h
        if PART < WIDE:
            x = load_rows(gate, row, end, gate_stride, part, part_in)
            y = load_rows(up, row, end, up_stride, part, part_in) if GATED else x
            plain, value, slope = _product(x.to(tl.float32), y, ACT, GATED)  # noqa: RUF059
        turned = tl.dot(h, turn, plain.to(tl.float32), input_precision=PRECISION)
        place = out + row[:, None] * width + part[None, :]
        tl.store(place, turned.to(dtype), (row < end)[:, None] & part_in[None, :])
        if AHEAD:
            x = next_x
            y = next_y


@triton.jit(do_not_specialize=["rows", "n", "tiles"])
def _backward(
    grad: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    core: tl.tensor,
    grad_gate: tl.tensor,
    grad_up: tl.tensor,
    gram: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    tiles: tl.tensor,
    width: tl.tensor,
    grad_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    core_block: tl.tensor,
    core_row: tl.tensor,
    core_col: tl.tensor,
    B: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    EVEN: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    ROTATE: tl.constexpr,
    GRAM: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The same, of all gradients."""
    split, first, begin, end = locate(rows, n, tiles, PACK, WIDE // PART, TILE)
    dtype = gate.dtype.element_ty
    whole, whole_in, part, part_in = columns_of(first, n, B, PACK, WIDE, PART, EVEN)
    shift = first.to(tl.int64) * B
    grad += begin * grad_stride + shift
    gate += begin * gate_stride + shift
    up += begin * up_stride + shift
    grad_gate += begin * width + shift
    grad_up += begin * width + shift
    lane = tl.arange(0, TILE)
    if ROTATE:
        turn = diagonal(core, first, n, part, core_block, core_row, core_col, B, PACK, WIDE, dtype)
    if GRAM:
        found = tl.full((WIDE, PART), 0.0, tl.float32)

    for start in range(0, end, TILE):
        row = start + lane
        g = load_rows(grad, row, end, grad_stride, whole, whole_in)
        x = load_rows(gate, row, end, gate_stride, part, part_in)
        y = load_rows(up, row, end, up_stride, part, part_in) if GATED else x
        inner = x.to(tl.float32)
        if ROTATE:
            plain = g if PART == WIDE else load_rows(grad, row, end, grad_stride, part, part_in)
            grad_h = tl.dot(g, turn, plain.to(tl.float32), input_precision=PRECISION)
            inner = beside(inner, grad_h)
        h, value, slope = _product(inner, y, ACT, GATED)
        if ROTATE:
            place = row[:, None] * width + part[None, :]
            there = (row < end)[:, None] & part_in[None, :]
            if GATED:
                tl.store(grad_up + place, (grad_h * value).to(dtype), there)
                grad_h *= y.to(tl.float32)
            tl.store(grad_gate + place, (grad_h * slope).to(dtype), there)
        if GRAM:
            found = tl.dot(tl.trans(g), h, found, input_precision=PRECISION)

    if GRAM:
        found = tl.trans(found)  # the other way around, gate and up would miss Triton's pipeline
        slot = (split.to(tl.int64) * n + first) * (B * B)
        store_gram(gram + slot, found, whole, whole_in, part, part_in, B)


def fits(gate: Tensor, core: Tensor, activation: str) -> bool:
    """Whether the kernels take these: what `rotate`'s takes, in blocks up to the widest."""
    return activation in ACTIVATIONS and core.shape[-1] <= WIDEST and rotate.fits(gate, core)


def glu_rotate(gate: Tensor, up: Tensor | None, core: Tensor, activation: str) -> Tensor:
    """`oftfx::glu_rotate`: gate and up of any strides to a contiguous result."""
    out = like(gate)
    gate_rows, gate_stride = rows_of(gate)
    up_rows, up_stride = (gate_rows, 0) if up is None else rows_of(up)
    work = _work(
        *_sizes(gate, core),
        (gate_stride, up_stride),
        core.stride(),
        (activation, up is not None),
        None,
        gate.device,
    )
    work.launch(gate_rows, up_rows, core, out)
    return out


def glu_rotate_grad(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    core: Tensor,
    activation: str,
    need_x: bool,
    need_core: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`oftfx::glu_rotate_grad`: all gradients from one reading of grad, gate and up."""
    grad_gate, grad_up, gram = shares(grad, gate, up, core, activation, need_x, need_core)
    return grad_gate, grad_up, total(gram, core.dtype) if need_core else core.new_empty(0)


def shares(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    core: Tensor,
    activation: str,
    need_x: bool,
    need_core: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `glu_rotate_grad` gives, but the core's gradient as its runs find it.

    That is (runs, n, b, b), float32.
    """
    grad_gate = like(gate, wanted=need_x)
    grad_up = like(gate, wanted=need_x and up is not None)
    if not (need_x or need_core):
        return grad_gate, grad_up, core.new_empty(0)
    work, rows = _cut(grad, gate, up, core, activation, (need_x, need_core))
    shape = (work.splits, *core.shape) if need_core else (0,)
    gram = torch.empty(shape, dtype=torch.float32, device=gate.device)
    work.launch(*rows, core, grad_gate, grad_up, gram)
    return grad_gate, grad_up, gram


def runs(
    grad: Tensor, gate: Tensor, up: Tensor | None, core: Tensor, activation: str, need_x: bool
) -> int:
    """How many `shares` there are of these tensors, which may be fake."""
    work, _ = _cut(grad, gate, up, core, activation, (need_x, True))
    return work.splits


def _cut(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    core: Tensor,
    activation: str,
    needs: tuple[bool, bool],
) -> tuple[Work, tuple[Tensor, ...]]:
    """The work of all gradients, and what it reads row by row."""
    grad_rows, grad_stride = rows_of(grad)
    gate_rows, gate_stride = rows_of(gate)
    up_rows, up_stride = (gate_rows, 0) if up is None else rows_of(up)
    block, row, col = core.stride()
    work = _work(
        *_sizes(gate, core),
        (grad_stride, gate_stride, up_stride),
        (block, col, row),  # of Cᵀ
        (activation, up is not None),
        needs,
        gate.device,
    )
    return work, (grad_rows, gate_rows, up_rows)


def _sizes(gate: Tensor, core: Tensor) -> tuple[int, int, int, torch.dtype, torch.dtype]:
    n, b, _ = core.shape
    return gate.numel() // (n * b) if n else 0, n, b, gate.dtype, core.dtype


def tiles(b: int, itemsize: int, gradients: bool) -> Tiles:
    """As for a rotation alone, but for what a wide core leaves the operands, on one H100."""
    chosen = rotate.tiles(b, itemsize, gradients)
    if itemsize == 4 or chosen.wide <= 64:
        return chosen
    if gradients:
        return chosen._replace(part=64, warps=4, waves=2)
    return chosen._replace(warps=4, stages=2, waves=2)


@functools.lru_cache(maxsize=4096)
def _work(
    rows: int,
    n: int,
    b: int,
    dtype: torch.dtype,
    core_dtype: torch.dtype,
    strides: tuple[int, ...],
    core_strides: tuple[int, int, int],
    kind: tuple[str, bool],
    needs: tuple[bool, bool] | None,
    device: torch.device,
) -> Work:
    """Chooses tiles and runs; ``needs`` says which gradients are wanted, None is forward."""
    chosen = tiles(b, dtype.itemsize, needs is not None)
    programs, run, splits = cut(rows, n, chosen, device, max(*strides, n * b))
    numbers = (rows, n, run, n * b, *strides, *core_strides)
    last: tuple[int | str, ...] = (PRECISION, chosen.stages == 0)
    if needs:
        last = (*needs, PRECISION)
    launch = Launch(
        _backward if needs else _forward,
        programs,
        numbers,
        (*layout(n, b, chosen), *kind, *last),
        **options(chosen),
    )
    return Work(launch, splits)
