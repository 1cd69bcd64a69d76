"""Rotation cores from their parameters and back, a block at a time, nothing in between stored.

A program unpacks one block, or as many narrow ones as fill a tensor core's tile (block-diagonal
matrices stay so in sums and products), and keeps every power of Q in registers.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.triton import wide_cayley
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.parts import EXACT, FAST, ROUNDED, parts, product
from oftfx.ops.triton.tiles import like

LARGEST = 64
"""The widest block: a few of its matrices still fit a program's registers."""

AT_ONCE = tl.constexpr(4)
"""How many runs' shares of a gradient wait for memory together: of few rows there are no more."""


@triton.jit
def _entries(
    first: tl.tensor, n: tl.tensor, B: tl.constexpr, PACK: tl.constexpr, WIDE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Rows and columns of a pack of the n blocks, which entries are a block's, whose parameters."""
    i, j = tl.arange(0, WIDE)[:, None], tl.arange(0, WIDE)[None, :]
    same = (i // B == j // B) & (tl.maximum(i, j) < PACK * B) & (first + i // B < n)
    low, high = tl.minimum(i, j) % B, tl.maximum(i, j) % B
    place = low * (2 * B - low - 1) // 2 + high - low - 1
    return i, j, same, i // B * (B * (B - 1) // 2) + place


@triton.jit
def _skew(
    theta: tl.tensor, i: tl.tensor, j: tl.tensor, same: tl.tensor, place: tl.tensor
) -> tl.tensor:
    q = tl.load(theta + place, same & (i != j), 0.0).to(tl.float32)
    return tl.where(i < j, q, -q)


@triton.jit
def build(
    theta: tl.tensor,
    core: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    B: tl.constexpr,
    ORDER: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """The series of [`oftfx.rotations.cayley.neumann`][], of a pack of the n blocks."""
    i, j, same, place = _entries(first, n, B, PACK, WIDE)
    q = _skew(theta + first * (B * (B - 1) // 2), i, j, same, place)
    none = tl.full((WIDE, WIDE), 0.0, tl.float32)
    turn = parts(q, KIND)
    square = product(turn, turn, none, KIND)
    value = q
    if ORDER % 2:
        value = 2 * q + square
    full = 2 * (q + square)
    twice = parts(square, KIND)
    for _ in tl.static_range(ORDER // 2):
        value = product(twice, parts(value, KIND), full, KIND)
    core += first * (B * B) + (i * B + j % B)
    tl.store(core, value.to(core.dtype.element_ty), same)


@triton.jit
def differentiate(
    grad: tl.tensor,
    theta: tl.tensor,
    out: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    runs: tl.tensor,
    apart: tl.tensor,
    B: tl.constexpr,
    ORDER: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """The steps of [`oftfx.rotations.cayley.neumann_grad`][], for a pack of the n blocks.

    The gradient is the sum of its runs', so many numbers apart, in their order.
    """
    i, j, same, place = _entries(first, n, B, PACK, WIDE)
    q = _skew(theta + first * (B * (B - 1) // 2), i, j, same, place)
    grad += first * (B * B) + (i * B + j % B)
    back = tl.full((WIDE, WIDE), 0.0, tl.float32)
    for start in range(0, runs, AT_ONCE):
        for run in tl.static_range(AT_ONCE):
            share = grad + (start + run) * apart.to(tl.int64)
            back += tl.load(share, same & (start + run < runs), 0.0).to(tl.float32)

    ODD: tl.constexpr = 0.0 if ORDER % 2 else 0.5
    EVEN: tl.constexpr = 1.0 if ORDER % 2 else 2.0
    none = tl.full((WIDE, WIDE), 0.0, tl.float32)
    turn = parts(q, KIND)
    other = tl.trans(back)
    both = back + other
    y = product(parts(back - other, KIND), turn, none, KIND)
    z = y + tl.trans(y)
    inner = ODD * z - EVEN * both
    right = inner + ODD * y
    if ORDER > 2:
        rest = z + y - 2 * both
        left = inner
        twice = parts(product(turn, turn, none, KIND), KIND)
        for _ in tl.static_range((ORDER - 1) // 2 - 1):
            inner = product(parts(inner, KIND), twice, rest - y, KIND)
            right = product(parts(right, KIND), twice, rest, KIND)
            left = product(twice, parts(left, KIND), inner, KIND)
        before = parts(left, KIND)
        right = product(parts(right, KIND), twice, rest, KIND)
        right = product(twice, before, right, KIND)
    value = product(parts(right, KIND), turn, 2 * back, KIND)
    value -= tl.trans(value)  # d theta_ij = d Q_ij − d Q_ji
    out += first * (B * (B - 1) // 2) + place
    tl.store(out, value.to(out.dtype.element_ty), same & (i < j))


@triton.jit(do_not_specialize=["n"])
def _cayley(
    theta: tl.tensor,
    core: tl.tensor,
    n: tl.tensor,
    B: tl.constexpr,
    ORDER: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * PACK
    build(theta, core, first, n, B, ORDER, PACK, WIDE, KIND)


@triton.jit(do_not_specialize=["n"])
def _cayley_grad(
    grad: tl.tensor,
    theta: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    B: tl.constexpr,
    ORDER: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * PACK
    differentiate(grad, theta, out, first, n, 1, n, B, ORDER, PACK, WIDE, KIND)


DTYPES = {torch.bfloat16, torch.float16, torch.float32}


def fits(theta: Tensor, block_size: int, order: int | None) -> bool:
    """Whether the kernels take these: a series, 16- and 32-bit parameters."""
    return order is not None and theta.dtype in DTYPES


def cayley(
    theta: Tensor, block_size: int, order: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`oftfx::cayley`: theta (…, b(b−1)/2) to (…, b, b), computed in and of this dtype."""
    n, b = theta.shape[:-1].numel(), block_size
    if n and b > LARGEST:
        return wide_cayley.cayley(theta, b, order, dtype)
    core = torch.empty((*theta.shape[:-1], b, b), dtype=dtype, device=theta.device)
    if n:
        _launch(_cayley, n, b, order, dtype, theta.dtype, theta.device)(theta.contiguous(), core)
    return core


def cayley_grad(
    grad: Tensor, theta: Tensor, block_size: int, order: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`oftfx::cayley_grad`: the gradient (…, b, b) of the cores to theta's, computed in it, too."""
    n, b = theta.shape[:-1].numel(), block_size
    if n and b > LARGEST:
        return wide_cayley.cayley_grad(grad, theta, b, order, dtype)
    out = like(theta)
    if n:
        launch = _launch(_cayley_grad, n, b, order, dtype, theta.dtype, theta.device)
        launch(grad.to(dtype).contiguous(), theta.contiguous(), out)
    return out


def rounded(theta: Tensor, block_size: int, order: int, dtype: torch.dtype) -> Tensor:
    """`oftfx::rounded_cayley`: every matrix that is multiplied is in this dtype."""
    return cayley(theta, block_size, order, dtype)


def rounded_grad(grad: Tensor, theta: Tensor, block_size: int, order: int) -> Tensor:
    """`oftfx::rounded_cayley_grad`: the same, in the gradient's dtype."""
    return cayley_grad(grad, theta, block_size, order, grad.dtype)


@functools.lru_cache(maxsize=1024)
def _launch(
    kernel: Any,
    n: int,
    b: int,
    order: int,
    dtype: torch.dtype,
    parameters: torch.dtype,
    device: torch.device,
) -> Launch:
    chosen, warps = tile(b, order, dtype, kernel is _cayley_grad)
    return Launch(kernel, triton.cdiv(n, chosen.pack), (n,), chosen, num_warps=warps)


class Tile(NamedTuple):
    """The last constants of every kernel, in order."""

    b: int
    order: int
    pack: int
    wide: int
    kind: str


def tile(b: int, order: int, dtype: torch.dtype, gradient: bool) -> tuple[Tile, int]:
    """What a program does, and with how many warps."""
    pack = max(1, 16 // b)
    wide = max(16, triton.next_power_of_2(pack * b))
    # As measured on one H100: narrow tiles gain more from many programs than from many warps.
    many = order > 2 and wide == 32
    warps = 4 if wide > 32 else 2 if many else 1
    # Gradients are of 16-bit activations, mostly.
    kind = ROUNDED.get(dtype) or (FAST if gradient else EXACT)
    return Tile(b, order, pack, wide, kind), warps
