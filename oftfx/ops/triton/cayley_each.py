"""The cores of several parameters where they lie, and their gradients, each in one launch.

A program finds the tensors that it works on by its number; what it does with a pack of blocks there
is [`oftfx.ops.triton.cayley`][]'s, to the bit.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.cayley_each import MOST
from oftfx.ops.triton.cayley import DTYPES, LARGEST, build, differentiate, fits, tile
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.tiles import like

__all__ = ["cayley_each", "cayley_each_grad", "cayley_joined", "fits", "fits_each"]


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
    build(theta, core, first, n, B, ORDER, PACK, WIDE, KIND)


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
    differentiate(grad, theta, out, first, n, runs, apart, B, ORDER, PACK, WIDE, KIND)


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
    outs = [like(theta) for theta in thetas]
    first = grads[0].dtype
    if first not in DTYPES or any(grad.dtype != first for grad in grads):
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
    launch = _launch(kernel, counts, b, order, dtypes, thetas[0].device, runs)
    tensors: list[Tensor] = []
    for each in operands:
        tensors += [tensor.contiguous() for tensor in each]
        tensors += tensors[-1:] * (MOST - len(each))
    launch(*tensors)


@functools.lru_cache(maxsize=1024)
def _launch(
    kernel: Any,
    counts: tuple[int, ...],
    b: int,
    order: int,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    runs: tuple[tuple[int, ...], ...] = (),
) -> Launch:
    chosen, warps = tile(b, order, dtypes[0], kernel is _cayley_each_grad)
    programs = sum(triton.cdiv(n, chosen.pack) for n in counts)
    numbers = [n for each in (counts, *runs) for n in (*each, *(0,) * (MOST - len(each)))]
    return Launch(kernel, programs, tuple(numbers), (len(counts), *chosen), num_warps=warps)
