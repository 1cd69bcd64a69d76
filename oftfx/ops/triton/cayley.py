"""Rotation cores from their parameters and back, a block at a time, nothing in between stored.

A program unpacks one block, or as many narrow ones as fill a tensor core's tile (block-diagonal
matrices stay so in sums and products), and keeps every power of Q in registers.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.triton import wide_cayley
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.rotate import COMPILED

LARGEST = 64
"""The widest block: a few of its matrices still fit a program's registers."""


@triton.jit(do_not_specialize=["n"])
def _cayley(
    theta: tl.tensor,
    core: tl.tensor,
    n: int,
    B: tl.constexpr,
    ORDER: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The series of [`oftfx.rotations.cayley.neumann`][]."""
    first = tl.program_id(0).to(tl.int64) * PACK
    i, j = tl.arange(0, WIDE)[:, None], tl.arange(0, WIDE)[None, :]
    same = (i // B == j // B) & (tl.maximum(i, j) < PACK * B) & (first + i // B < n)
    place = i % B * (2 * B - i % B - 1) // 2 + j % B - i % B - 1
    entry = (first + i // B) * (B * (B - 1) // 2) + place
    upper = tl.load(theta + entry, same & (i < j), 0.0).to(tl.float32)
    q = upper - tl.trans(upper)

    square = tl.dot(q, q, input_precision=PRECISION)
    value = q
    if ORDER % 2:
        value = 2 * q + square
    full = 2 * (q + square)
    for _ in tl.static_range(ORDER // 2):
        value = full + tl.dot(square, value, input_precision=PRECISION)
    tl.store(core + (first + i // B) * (B * B) + i % B * B + j % B, value, same)


@triton.jit(do_not_specialize=["n"])
def _cayley_grad(
    grad: tl.tensor,
    theta: tl.tensor,
    out: tl.tensor,
    n: int,
    B: tl.constexpr,
    ORDER: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The steps of [`oftfx.rotations.cayley.neumann_grad`][]."""
    first = tl.program_id(0).to(tl.int64) * PACK
    i, j = tl.arange(0, WIDE)[:, None], tl.arange(0, WIDE)[None, :]
    same = (i // B == j // B) & (tl.maximum(i, j) < PACK * B) & (first + i // B < n)
    place = i % B * (2 * B - i % B - 1) // 2 + j % B - i % B - 1
    entry = (first + i // B) * (B * (B - 1) // 2) + place
    upper = tl.load(theta + entry, same & (i < j), 0.0).to(tl.float32)
    q = upper - tl.trans(upper)
    back = tl.load(grad + (first + i // B) * (B * B) + i % B * B + j % B, same, 0.0).to(tl.float32)

    square = tl.dot(q, q, input_precision=PRECISION)
    full = 2 * (q + square)
    full_grad = tl.full((WIDE, WIDE), 0.0, tl.float32)
    square_grad = tl.full((WIDE, WIDE), 0.0, tl.float32)
    for step in tl.static_range(ORDER // 2):
        # The value that this step of Horner's rule had read: made anew, for k ≤ 3 it is the first.
        value = q
        if ORDER % 2:
            value = 2 * q + square
        for _ in tl.static_range(ORDER // 2 - 1 - step):
            value = full + tl.dot(square, value, input_precision=PRECISION)
        full_grad += back
        square_grad += tl.dot(back, tl.trans(value), input_precision=PRECISION)
        back = tl.dot(square, back, input_precision=PRECISION)
    square_grad += 2 * full_grad
    if ORDER % 2:
        square_grad += back
        back = 2 * back
    both = square_grad + tl.trans(square_grad)
    back += 2 * full_grad - tl.dot(both, q, input_precision=PRECISION)
    # d theta_ij = d Q_ij − d Q_ji
    tl.store(out + entry, (back - tl.trans(back)).to(out.dtype.element_ty), same & (i < j))


_DTYPES = {torch.bfloat16, torch.float16, torch.float32}


def fits(theta: Tensor, block_size: int, order: int | None) -> bool:
    """Whether the kernels take these: a series, 16- and 32-bit parameters."""
    return order is not None and theta.dtype in _DTYPES


def cayley(theta: Tensor, block_size: int, order: int) -> Tensor:
    """`oftfx::cayley`: theta (…, b(b−1)/2) to (…, b, b) in float32."""
    n, b = theta.shape[:-1].numel(), block_size
    if n and b > LARGEST:
        return wide_cayley.cayley(theta, b, order)
    core = torch.empty((*theta.shape[:-1], b, b), dtype=torch.float32, device=theta.device)
    if n:
        _launch(_cayley, n, b, order, theta.dtype, theta.device)(theta.contiguous(), core)
    return core


def cayley_grad(grad: Tensor, theta: Tensor, block_size: int, order: int) -> Tensor:
    """`oftfx::cayley_grad`: the gradient (…, b, b) of the cores to theta's."""
    n, b = theta.shape[:-1].numel(), block_size
    if n and b > LARGEST:
        return wide_cayley.cayley_grad(grad, theta, b, order)
    out = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
    if n:
        launch = _launch(_cayley_grad, n, b, order, theta.dtype, theta.device)
        launch(grad.contiguous(), theta.contiguous(), out)
    return out


@functools.lru_cache(maxsize=1024)
def _launch(
    kernel: Any, n: int, b: int, order: int, dtype: torch.dtype, device: torch.device
) -> Launch:
    pack = max(1, 16 // b)
    wide = max(16, triton.next_power_of_2(pack * b))
    # As measured on one H100: narrow tiles gain more from many programs than from many warps.
    many = order > 3 and wide == 32
    warps = 4 if wide > 32 else 2 if many else 1
    # Three products of tf32 parts are as exact as float32's own, and faster; of bf16 parts, which
    # lose 2e-6 of a gradient that 16-bit activations gave, faster still.
    precision = "bf16x3" if COMPILED and kernel is _cayley_grad else "tf32x3"
    constants = (b, order, pack, wide, precision)
    return Launch(kernel, triton.cdiv(n, pack), (n,), constants, num_warps=warps)
