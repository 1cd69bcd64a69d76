"""Cores of wide blocks: the steps of their series as products of tiles, each with what it adds.

A program computes one tile of one block's ``A·B + C·D + v·E + w·F``; a few launches, in which every
matrix is read and written once, are then the series or its gradient. Matrices are float32, or for
`oftfx::rounded_cayley` of 16 bits, with sums in float32.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.parts import FAST, parts, product
from oftfx.ops.triton.tiles import like


@triton.jit
def _place(i: tl.tensor, j: tl.tensor, B: tl.constexpr) -> tl.tensor:
    """Where the parameters of a block have the entry (i, j) above its diagonal."""
    return i * (2 * B - i - 1) // 2 + j - i - 1


@triton.jit
def _tile(B: tl.constexpr, TILE: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A program's block, its rows and columns there, and which of those there are."""
    SIDE: tl.constexpr = (B + TILE - 1) // TILE
    tile = tl.program_id(0) % (SIDE * SIDE)
    lane = tl.arange(0, TILE)
    i = (tile // SIDE * TILE + lane)[:, None]
    j = (tile % SIDE * TILE + lane)[None, :]
    return (tl.program_id(0) // (SIDE * SIDE)).to(tl.int64), i, j, (i < B) & (j < B)


@triton.jit
def _unpack(theta: tl.tensor, out: tl.tensor, B: tl.constexpr, TILE: tl.constexpr) -> None:
    """Parameters to skew matrices."""
    block, i, j, there = _tile(B, TILE)
    theta += block * (B * (B - 1) // 2)
    above = tl.load(theta + _place(i, j, B), there & (i < j), 0.0).to(tl.float32)
    below = tl.load(theta + _place(j, i, B), there & (i > j), 0.0).to(tl.float32)
    tl.store(out + block * (B * B) + i * B + j, (above - below).to(out.dtype.element_ty), there)


@triton.jit
def _pack(grad: tl.tensor, out: tl.tensor, B: tl.constexpr, TILE: tl.constexpr) -> None:
    """The gradient of skew matrices to their parameters': d theta_ij = d Q_ij − d Q_ji."""
    block, i, j, there = _tile(B, TILE)
    grad += block * (B * B)
    there &= i < j
    value = tl.load(grad + i * B + j, there, 0.0).to(tl.float32)
    value -= tl.load(grad + j * B + i, there, 0.0).to(tl.float32)
    out += block * (B * (B - 1) // 2)
    tl.store(out + _place(i, j, B), value.to(out.dtype.element_ty), there)


@triton.jit
def _mix(
    y: tl.tensor,
    grad: tl.tensor,
    inner: tl.tensor,
    right: tl.tensor,
    rest: tl.tensor,
    B: tl.constexpr,
    TILE: tl.constexpr,
    ODD: tl.constexpr,
    MORE: tl.constexpr,
) -> None:
    """What [`oftfx.rotations.cayley.neumann_grad`][] adds up of Y, G and their transposes.

    Of odd orders ``right`` is ``inner``; ``rest`` is for those that have MORE.
    """
    block, i, j, there = _tile(B, TILE)
    block *= B * B
    here, across = block + i * B + j, block + j * B + i
    own = tl.load(y + here, there, 0.0).to(tl.float32)
    z = own + tl.load(y + across, there, 0.0).to(tl.float32)
    both = tl.load(grad + here, there, 0.0).to(tl.float32)
    both += tl.load(grad + across, there, 0.0).to(tl.float32)
    if ODD:
        value = -both
    else:
        value = 0.5 * z - 2.0 * both
        tl.store(right + here, (value + 0.5 * own).to(right.dtype.element_ty), there)
    tl.store(inner + here, value.to(inner.dtype.element_ty), there)
    if MORE:
        tl.store(rest + here, (z + own - 2.0 * both).to(rest.dtype.element_ty), there)


@triton.jit
def _multiplied(
    total: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    B: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    FORM: tl.constexpr,
    KIND: tl.constexpr,
) -> tl.tensor:
    """``total`` and a tile of ``a·b``, or by its form of ``aᵀ·bᵀ``."""
    lane = tl.arange(0, STEP)
    for start in range(0, B, STEP):
        k = start + lane
        across, down = k[None, :], k[:, None]
        left_at = across * B + i if FORM == "turned" else i * B + across
        right_at = j * B + down if FORM == "turned" else down * B + j
        if EVEN:  # copied as they are, past the registers
            left = tl.load(a + left_at)
            right = tl.load(b + right_at)
        else:
            left = tl.load(a + left_at, (i < B) & (across < B), 0.0)
            right = tl.load(b + right_at, (down < B) & (j < B), 0.0)
        if left.dtype == tl.float32:
            total = product(parts(left, KIND), parts(right, KIND), total, KIND)
        else:
            total = tl.dot(left, right, total)
    return total


@triton.jit
def _combine(
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    e: tl.tensor,
    f: tl.tensor,
    out: tl.tensor,
    B: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """``out = a·b + c·d + V·e + W·f``, products by their forms; what has none or 0 is left out."""
    block, i, j, there = _tile(B, TILE)
    block *= B * B
    here = block + i * B + j
    total = tl.full((TILE, TILE), 0.0, tl.float32)
    if V:
        total += V * tl.load(e + here, there, 0.0).to(tl.float32)
    if W:
        total += W * tl.load(f + here, there, 0.0).to(tl.float32)
    total = _multiplied(total, a + block, b + block, i, j, B, STEP, EVEN, FIRST, KIND)
    if SECOND != "":
        total = _multiplied(total, c + block, d + block, i, j, B, STEP, EVEN, SECOND, KIND)
    tl.store(out + here, total.to(out.dtype.element_ty), there)


TILE = 64
"""Of passes that multiply nothing."""

Product = tuple[Tensor, Tensor, str]
"""Two matrices and how they are multiplied: as they are ("+"), or both "turned"."""


def _combined(products: Sequence[Product], added: Sequence[tuple[int, Tensor]] = ()) -> Tensor:
    """The sum of one or two products and up to two multiples of matrices (n, b, b) of a dtype."""
    (a, b, first), *second = products
    c, d, form = second[0] if second else (a, b, "")
    (v, e), (w, f) = (*added, (0, a), (0, a))[:2]
    out = torch.empty_like(a)
    _launch(*a.shape[:2], (first, form, v, w), a.dtype, a.device)(a, b, c, d, e, f, out)
    return out


class Shape(NamedTuple):
    """The side of a program's tile, how much of what it sums it reads at a time, and as `Tiles`."""

    tile: int
    step: int
    warps: int
    stages: int


# As measured on one H100, for matrices in 32 and in 16 bits.
SHAPES = {4: Shape(64, 32, 4, 3), 2: Shape(128, 64, 8, 3)}


@functools.lru_cache(maxsize=256)
def _launch(
    n: int, b: int, what: tuple[str | int, ...], dtype: torch.dtype, device: torch.device
) -> Launch:
    tile, step, warps, stages = SHAPES[dtype.itemsize]
    programs = n * triton.cdiv(b, tile) ** 2
    constants = (b, tile, step, b % tile == 0 and b % step == 0, *what, FAST)
    return Launch(_combine, programs, (), constants, num_warps=warps, num_stages=stages)


@functools.lru_cache(maxsize=256)
def _passing(
    kernel: object,
    n: int,
    b: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    *what: bool,
) -> Launch:
    return Launch(kernel, n * triton.cdiv(b, TILE) ** 2, (), (b, TILE, *what), num_warps=4)


def _unpacked(theta: Tensor, b: int, dtype: torch.dtype) -> Tensor:
    n = theta.shape[:-1].numel()
    q = torch.empty((n, b, b), dtype=dtype, device=theta.device)
    _passing(_unpack, n, b, (theta.dtype, dtype), theta.device)(theta.contiguous(), q)
    return q


def cayley(theta: Tensor, b: int, order: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The series' core, (…, b, b); in 16 bits every matrix on the way is, too."""
    q = _unpacked(theta, b, dtype)
    square = _combined([(q, q, "+")])
    value = torch.add(square, q, alpha=2) if order % 2 else q
    for _ in range(order // 2):
        value = _combined([(square, value, "+")], [(2, q), (2, square)])
    return value.view(*theta.shape[:-1], b, b)


def cayley_grad(
    grad: Tensor, theta: Tensor, b: int, order: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Its gradient, (…, b, b), to the parameters'; the steps are `neumann_grad`'s."""
    q = _unpacked(theta, b, dtype)
    grad = grad.reshape(-1, b, b).contiguous().to(dtype)
    y = _combined([(grad, q, "+"), (grad, q, "turned")])  # GQ − GᵀQ, Qᵀ being −Q
    odd, more = order % 2 == 1, order > 2
    inner = torch.empty_like(grad)
    right = inner if odd else torch.empty_like(grad)
    rest = torch.empty_like(grad) if more else inner
    mix = _passing(_mix, len(q), b, (dtype, dtype), theta.device, odd, more)
    mix(y, grad, inner, right, rest)
    if more:
        square, left = _combined([(q, q, "+")]), inner
        for _ in range((order - 1) // 2 - 1):
            inner = _combined([(inner, square, "+")], [(1, rest), (-1, y)])
            right = _combined([(right, square, "+")], [(1, rest)])
            left = _combined([(square, left, "+")], [(1, inner)])
        right = _combined([(right, square, "+"), (square, left, "+")], [(1, rest)])
    q_grad = _combined([(right, q, "+")], [(2, grad)])
    out = like(theta)
    _passing(_pack, len(q), b, (theta.dtype, dtype), theta.device)(q_grad, out)
    return out
