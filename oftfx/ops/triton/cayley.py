"""Rotation cores from their parameters and back, a block at a time, nothing in between stored.

A program unpacks one block, or as many narrow ones as fill a tensor core's tile (block-diagonal
matrices stay so in sums and products), and keeps every power of Q in registers.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.triton import wide_cayley
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.parts import EXACT, FAST, ROUNDED, parts, product

LARGEST = 64
"""The widest block: a few of its matrices still fit a program's registers."""

MOST = 8
"""How many parameters a launch takes where they lie: a transformer layer has seven."""

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
def _build(
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
def _differentiate(
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
    _build(theta, core, first, n, B, ORDER, PACK, WIDE, KIND)


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
    _differentiate(grad, theta, out, first, n, 1, n, B, ORDER, PACK, WIDE, KIND)


@triton.jit
def _chosen(tensors: tl.tuple, which: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """One of several tensors, by a number that only the running program knows."""
    found = tensors[0]
    for i in tl.static_range(1, COUNT):
        found = tl.where(which == i, tensors[i], found)
    return found


@triton.jit
def _located(
    counts: tl.tuple, COUNT: tl.constexpr, PACK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Which tensor a program has, its first block there, and how many there are.

    Every tensor begins a pack, as it does alone: its blocks then have the bits they have there.
    """
    program = tl.program_id(0)
    which = program * 0
    begin = program * 0
    # Not `tl.cdiv`: the interpreter refuses it where triton was imported before it was asked for.
    end = (counts[0] + PACK - 1) // PACK
    for i in tl.static_range(1, COUNT):
        which = tl.where(program >= end, i, which)
        begin = tl.where(program >= end, end, begin)
        end += (counts[i] + PACK - 1) // PACK
    return which, (program - begin).to(tl.int64) * PACK, _chosen(counts, which, COUNT)


_COUNTS = [f"n_{i}" for i in range(MOST)]
_RUNS = [f"{name}_{i}" for name in ("runs", "apart") for i in range(MOST)]


@triton.jit(do_not_specialize=_COUNTS)
def _cayley_each(
    theta_0: tl.tensor,
    theta_1: tl.tensor,
    theta_2: tl.tensor,
    theta_3: tl.tensor,
    theta_4: tl.tensor,
    theta_5: tl.tensor,
    theta_6: tl.tensor,
    theta_7: tl.tensor,
    core_0: tl.tensor,
    core_1: tl.tensor,
    core_2: tl.tensor,
    core_3: tl.tensor,
    core_4: tl.tensor,
    core_5: tl.tensor,
    core_6: tl.tensor,
    core_7: tl.tensor,
    n_0: tl.tensor,
    n_1: tl.tensor,
    n_2: tl.tensor,
    n_3: tl.tensor,
    n_4: tl.tensor,
    n_5: tl.tensor,
    n_6: tl.tensor,
    n_7: tl.tensor,
    COUNT: tl.constexpr,
    B: tl.constexpr,
    ORDER: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    which, first, n = _located((n_0, n_1, n_2, n_3, n_4, n_5, n_6, n_7), COUNT, PACK)
    theta = _chosen(
        (theta_0, theta_1, theta_2, theta_3, theta_4, theta_5, theta_6, theta_7), which, COUNT
    )
    core = _chosen((core_0, core_1, core_2, core_3, core_4, core_5, core_6, core_7), which, COUNT)
    _build(theta, core, first, n, B, ORDER, PACK, WIDE, KIND)


@triton.jit(do_not_specialize=_COUNTS + _RUNS)
def _cayley_each_grad(
    grad_0: tl.tensor,
    grad_1: tl.tensor,
    grad_2: tl.tensor,
    grad_3: tl.tensor,
    grad_4: tl.tensor,
    grad_5: tl.tensor,
    grad_6: tl.tensor,
    grad_7: tl.tensor,
    theta_0: tl.tensor,
    theta_1: tl.tensor,
    theta_2: tl.tensor,
    theta_3: tl.tensor,
    theta_4: tl.tensor,
    theta_5: tl.tensor,
    theta_6: tl.tensor,
    theta_7: tl.tensor,
    out_0: tl.tensor,
    out_1: tl.tensor,
    out_2: tl.tensor,
    out_3: tl.tensor,
    out_4: tl.tensor,
    out_5: tl.tensor,
    out_6: tl.tensor,
    out_7: tl.tensor,
    n_0: tl.tensor,
    n_1: tl.tensor,
    n_2: tl.tensor,
    n_3: tl.tensor,
    n_4: tl.tensor,
    n_5: tl.tensor,
    n_6: tl.tensor,
    n_7: tl.tensor,
    runs_0: tl.tensor,
    runs_1: tl.tensor,
    runs_2: tl.tensor,
    runs_3: tl.tensor,
    runs_4: tl.tensor,
    runs_5: tl.tensor,
    runs_6: tl.tensor,
    runs_7: tl.tensor,
    apart_0: tl.tensor,
    apart_1: tl.tensor,
    apart_2: tl.tensor,
    apart_3: tl.tensor,
    apart_4: tl.tensor,
    apart_5: tl.tensor,
    apart_6: tl.tensor,
    apart_7: tl.tensor,
    COUNT: tl.constexpr,
    B: tl.constexpr,
    ORDER: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    which, first, n = _located((n_0, n_1, n_2, n_3, n_4, n_5, n_6, n_7), COUNT, PACK)
    grad = _chosen((grad_0, grad_1, grad_2, grad_3, grad_4, grad_5, grad_6, grad_7), which, COUNT)
    theta = _chosen(
        (theta_0, theta_1, theta_2, theta_3, theta_4, theta_5, theta_6, theta_7), which, COUNT
    )
    out = _chosen((out_0, out_1, out_2, out_3, out_4, out_5, out_6, out_7), which, COUNT)
    runs = _chosen((runs_0, runs_1, runs_2, runs_3, runs_4, runs_5, runs_6, runs_7), which, COUNT)
    apart = _chosen(
        (apart_0, apart_1, apart_2, apart_3, apart_4, apart_5, apart_6, apart_7), which, COUNT
    )
    _differentiate(grad, theta, out, first, n, runs, apart, B, ORDER, PACK, WIDE, KIND)


_DTYPES = {torch.bfloat16, torch.float16, torch.float32}


def fits(theta: Tensor, block_size: int, order: int | None) -> bool:
    """Whether the kernels take these: a series, 16- and 32-bit parameters."""
    return order is not None and theta.dtype in _DTYPES


def cayley(
    theta: Tensor, block_size: int, order: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`oftfx::cayley`: theta (…, b(b−1)/2) to (…, b, b) in float32."""
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
    """`oftfx::cayley_grad`: the gradient (…, b, b) of the cores to theta's."""
    n, b = theta.shape[:-1].numel(), block_size
    if n and b > LARGEST:
        return wide_cayley.cayley_grad(grad, theta, b, order, dtype)
    out = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
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


def fits_each(thetas: Sequence[Tensor], block_size: int) -> bool:
    """Whether one launch takes all of these, of which `fits` said that it takes the first."""
    first = thetas[0]
    return (
        len(thetas) <= MOST
        and block_size <= LARGEST
        and all(theta.dim() == 2 and theta.dtype == first.dtype for theta in thetas)
    )


def cayley_each(
    thetas: Sequence[Tensor], block_size: int, order: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """`oftfx::cayley_each`: thetas (n, b(b−1)/2), each of its own n, each to (n, b, b)."""
    shape, device, dtype = (block_size, block_size), thetas[0].device, dtype or torch.float32
    cores = [torch.empty((len(t), *shape), dtype=dtype, device=device) for t in thetas]
    _run(_cayley_each, block_size, order, dtype, thetas, cores)
    return cores


def cayley_joined(
    thetas: Sequence[Tensor], block_size: int, order: int, dtype: torch.dtype | None = None
) -> Tensor:
    """`oftfx::cayley_joined`: the same cores, those of each behind those of the one before."""
    counts, dtype = [len(theta) for theta in thetas], dtype or torch.float32
    shape, device = (sum(counts), block_size, block_size), thetas[0].device
    joined = torch.empty(shape, dtype=dtype, device=device)
    _run(_cayley_each, block_size, order, dtype, thetas, joined.split(counts))
    return joined


def cayley_each_grad(
    grads: Sequence[Tensor],
    thetas: Sequence[Tensor],
    block_size: int,
    order: int,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`oftfx::cayley_each_grad`: for each its gradient, (n, b, b) to (n, b(b−1)/2).

    Or the gradient in shares of runs, (runs, n, b, b), which are added as they are read.
    """
    outs = [torch.empty(theta.shape, dtype=theta.dtype, device=theta.device) for theta in thetas]
    first = grads[0].dtype
    if first not in _DTYPES or any(grad.dtype != first for grad in grads):
        grads = [grad.float() for grad in grads]
    firsts, *runs = zip(*map(_first, grads), strict=True)
    kind = dtype or torch.float32
    _run(_cayley_each_grad, block_size, order, kind, firsts, thetas, outs, runs=tuple(runs))
    return outs


def _first(grad: Tensor) -> tuple[Tensor, int, int]:
    """The first share of a gradient, how many there are, and how far they are apart."""
    if grad.dim() == 3:
        return grad, 1, 0
    if not grad[0].is_contiguous():
        grad = grad.contiguous()
    return grad[0], len(grad), grad.stride(0)


def _run(
    kernel: Any,
    b: int,
    order: int,
    dtype: torch.dtype,
    *operands: Sequence[Tensor],
    runs: tuple[tuple[int, ...], ...] = (),
) -> None:
    """Launches a kernel on its operands, of each parameter one: parameters next to last."""
    thetas = operands[-2]
    counts = tuple(len(theta) for theta in thetas)
    if not any(counts):
        return
    dtypes = dtype, thetas[0].dtype, operands[0][0].dtype
    launch = _launch_each(kernel, counts, b, order, dtypes, thetas[0].device, runs)
    tensors: list[Tensor] = []
    for each in operands:
        tensors += [tensor.contiguous() for tensor in each]
        tensors += tensors[-1:] * (MOST - len(each))
    launch(*tensors)


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
    tile, warps = _tile(b, order, dtype, kernel is _cayley_grad)
    return Launch(kernel, triton.cdiv(n, tile.pack), (n,), tile, num_warps=warps)


@functools.lru_cache(maxsize=1024)
def _launch_each(
    kernel: Any,
    counts: tuple[int, ...],
    b: int,
    order: int,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    runs: tuple[tuple[int, ...], ...] = (),
) -> Launch:
    tile, warps = _tile(b, order, dtypes[0], kernel is _cayley_each_grad)
    programs = sum(triton.cdiv(n, tile.pack) for n in counts)
    numbers = [n for each in (counts, *runs) for n in (*each, *(0,) * (MOST - len(each)))]
    return Launch(kernel, programs, tuple(numbers), (len(counts), *tile), num_warps=warps)


class _Tile(NamedTuple):
    """The last constants of every kernel, in order."""

    b: int
    order: int
    pack: int
    wide: int
    kind: str


def _tile(b: int, order: int, dtype: torch.dtype, gradient: bool) -> tuple[_Tile, int]:
    """What a program does, and with how many warps."""
    pack = max(1, 16 // b)
    wide = max(16, triton.next_power_of_2(pack * b))
    # As measured on one H100: narrow tiles gain more from many programs than from many warps.
    many = order > 2 and wide == 32
    warps = 4 if wide > 32 else 2 if many else 1
    # Gradients are of 16-bit activations, mostly.
    kind = ROUNDED.get(dtype) or (FAST if gradient else EXACT)
    return _Tile(b, order, pack, wide, kind), warps
