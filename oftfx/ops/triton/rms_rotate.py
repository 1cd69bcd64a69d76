"""Gradients of rotations of an RMSNorm: those of `norm_rotate`, and what goes through its rows.

grad, sums      of x with rstd held fixed, and of rstd, from one reading of what came back
dx = grad − x·sum·rstd³/width
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.norm_rotate import Norm
from oftfx.ops.triton import norm_rotate
from oftfx.ops.triton.add import totals
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.tiles import rows_of

MOST = 4096
"""Columns that a program holds at once."""


@triton.jit(do_not_specialize=["rows", "packs", "stride"])
def _through(
    grad: tl.tensor,
    source: tl.tensor,
    rstd: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    packs: tl.tensor,
    stride: tl.tensor,
    PACKS: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """One row, in place; its sum comes in packs' shares, (packs, rows)."""
    row = tl.program_id(0).to(tl.int64)
    pack = tl.arange(0, PACKS)
    shares = tl.load(sums + pack * rows.to(tl.int64) + row, pack < packs, 0.0)
    r = tl.load(rstd + row).to(tl.float32)
    share = tl.reduce(shares, 0, tl.standard._sum_combine) * r * r * r / width
    grad += row * width
    source += row * stride
    for start in range(0, width, SIZE):
        column = start + tl.arange(0, SIZE)
        there = column < width
        x = tl.load(source + column, there, 0.0).to(tl.float32)
        own = tl.load(grad + column, there, 0.0).to(tl.float32) - x * share
        tl.store(grad + column, own.to(grad.dtype.element_ty), there)


def fits(x: Tensor, cores: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether the kernels take these: what `norm_rotate`'s do."""
    return norm_rotate.fits(x, cores, dtype)


def rms_rotate_grad(
    grads: list[Tensor],
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    cores: list[Tensor],
    need_cores: bool,
) -> tuple[Tensor, list[Tensor]]:
    """`oftfx::rms_rotate_grad`: one reading of the gradients and x, and one more of x."""
    norm = Norm(None, rstd, weight)
    grad, sums, gram = norm_rotate.gradients(grads, x, norm, cores, True, need_cores)
    grad_cores = totals(gram, cores) if need_cores else [core.new_empty(0) for core in cores]
    rows, stride = rows_of(x)
    width, packs = x.shape[-1], sums.shape[1]
    if grad.numel():
        dtypes = (x.dtype, rstd.dtype)
        _launch(x.numel() // width, width, packs, stride, dtypes, x.device)(
            grad, rows, rstd.reshape(-1).contiguous(), sums
        )
    return grad, grad_cores


@functools.lru_cache(maxsize=1024)
def _launch(
    rows: int,
    width: int,
    packs: int,
    stride: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
) -> Launch:
    size = min(MOST, triton.next_power_of_2(width))
    constants = (triton.next_power_of_2(packs), size)
    numbers = (rows, width, packs, stride)
    return Launch(_through, rows, numbers, constants, num_warps=max(1, min(8, size // 512)))
