"""A norm with given statistics and one to three rotations of it, in one pass over x each way.

The programs are those of `rotate_group`, but what they turn they compute: a tile of x, less its
rows' means, times a number a row and a number a column. The backward computes it again.

    out_i = y + y·blockdiag(C_i)             y = (x − mean)·rstd·weight + bias
    gram_i = (grad_iᵀ y)ᵀ
    dy = Σ grad_i + grad_i·blockdiag(C_iᵀ)   dx = dy·weight·rstd, and two sums along each row
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from oftfx.ops.norm_rotate import Norm
from oftfx.ops.triton import rotate, rotate_group
from oftfx.ops.triton.add import total, totals
from oftfx.ops.triton.blocks import PRECISION
from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.norm_kernels import backward, forward
from oftfx.ops.triton.rotate import LARGEST, largest
from oftfx.ops.triton.tiles import (
    Tiles,
    alike,
    cut,
    layout,
    like,
    options,
    rows_alike,
    rows_of,
    three,
    uniform,
)

WIDEST = 128
"""The widest block of a single rotation; of several, as in `rotate_group`."""


def fits(
    x: Tensor, cores: Sequence[Tensor], dtype: torch.dtype, grads: Sequence[Tensor] = ()
) -> bool:
    """Whether the kernels take these: one to three rotations alike, of 16 bits.

    Gradients are one for each of them or, of a single one, up to three, of its readers. For float32
    products of several parts a program lacks registers; x itself may be float32.
    """
    first, most = cores[0], max(len(cores), len(grads))
    return (
        most <= 3
        and len(grads) in (0, most)
        and len(cores) in (1, most)
        and dtype.itemsize == 2
        and x.dtype in (dtype, torch.float32)
        and rotate.fits(x, first)
        and first.shape[-1] <= (WIDEST if most == 1 else rotate_group.WIDEST)
        and largest(x.device) == LARGEST
        and uniform(cores, first.dtype, first.shape)
        and uniform(grads, dtype)
    )


def norm_rotate(x: Tensor, norm: Norm, cores: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`oftfx::norm_rotate`: x (..., n·b) of any strides and cores (n, b, b), in one reading."""
    outs = [like(x, dtype) for _ in cores]
    rows, stride = rows_of(x)
    cores, strides = alike(cores)
    work = _work(_problem(rows, stride, norm, cores, dtype), 0, strides, 0, ())
    work.launch(rows, *_vectors(norm), *three(cores), *three(outs))
    return outs


def norm_rotate_grad(
    grads: list[Tensor],
    x: Tensor,
    norm: Norm,
    cores: list[Tensor],
    need_x: bool,
    need_cores: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`oftfx::norm_rotate_grad` but for weight and bias: one reading of ``grads`` and ``x``.

    Of a single core there may be several gradients, of its readers.
    """
    grad_x, grad_mean, grad_rstd, (gram,) = shares(grads, x, norm, cores, need_x, need_cores)
    grad_cores = totals(gram, cores) if need_cores else [core.new_empty(0) for core in cores]
    return grad_x, grad_mean, grad_rstd, grad_cores


def shares(
    grads: list[Tensor],
    x: Tensor,
    norm: Norm,
    cores: list[Tensor],
    need_x: bool,
    need_cores: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """What `norm_rotate_grad` gives, but the cores' gradients as its runs find them.

    They come in one tensor, (runs, cores, n, b, b), float32.
    """
    grad_x, sums, gram = gradients(grads, x, norm, cores, need_x, need_cores)
    grad_mean, grad_rstd = x.new_empty(0), x.new_empty(0)
    if need_x:
        grad_rstd = total(sums[0], norm.rstd.dtype).reshape(norm.rstd.shape)
        if norm.mean is not None:
            grad_mean = total(sums[1], norm.mean.dtype).reshape(norm.mean.shape)
    return grad_x, grad_mean, grad_rstd, [gram]


def gradients(
    grads: list[Tensor],
    x: Tensor,
    norm: Norm,
    cores: list[Tensor],
    need_x: bool,
    need_cores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `shares` gives, but rstd's gradients in shares too: (1, packs, rows), float32.

    Where there is a mean, (2, packs, rows): rstd's and the mean's.
    """
    grad_x = like(x, wanted=need_x)
    if not (need_x or need_cores):
        return grad_x, x.new_empty(0), x.new_empty(0)
    work, operands = _cut(grads, x, norm, cores, (need_x, need_cores))
    rows = x.shape[:-1].numel()
    shape: tuple[int, ...] = (1 if norm.mean is None else 2, work.packs, rows) if need_x else (0,)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    shape = (work.splits, len(cores), *cores[0].shape) if need_cores else (0,)
    gram = torch.empty(shape, dtype=torch.float32, device=x.device)
    work.launch(*operands, grad_x, sums, gram)
    return grad_x, sums, gram


def runs(grads: list[Tensor], x: Tensor, norm: Norm, cores: list[Tensor], need_x: bool) -> int:
    """How many `shares` there are of these tensors, which may be fake."""
    work, _ = _cut(grads, x, norm, cores, (need_x, True))
    return work.splits


def _vectors(norm: Norm) -> list[Tensor]:
    """The norm's four operands, each one number after another; any tensor for what is absent."""
    rstd = norm.rstd.reshape(-1).contiguous()
    return [rstd if t is None or t is norm.rstd else t.reshape(-1).contiguous() for t in norm]


class Problem(NamedTuple):
    """What the choice of programs depends on, forward and backward.

    Attributes:
        rows: Of x.
        n: Blocks.
        b: Their width.
        rotations: How many.
        stride: Between rows of x.
        dtypes: Of x, of what is rotated, of the cores, and of the norm's four operands.
        device: Where.
    """

    rows: int
    n: int
    b: int
    rotations: int
    stride: int
    dtypes: tuple[torch.dtype | None, ...]
    device: torch.device


def _problem(
    rows: Tensor, stride: int, norm: Norm, cores: list[Tensor], dtype: torch.dtype
) -> Problem:
    n, b, _ = cores[0].shape
    dtypes = (rows.dtype, dtype, cores[0].dtype, *(None if t is None else t.dtype for t in norm))
    count = rows.numel() // (n * b) if n else 0
    return Problem(count, n, b, len(cores), stride, dtypes, rows.device)


class Work(NamedTuple):
    """One problem cut into programs.

    Attributes:
        launch: Runs them.
        splits: Into how many runs the rows are cut.
        packs: Into how many packs the blocks are.
    """

    launch: Launch
    splits: int
    packs: int


def _cut(
    grads: list[Tensor], x: Tensor, norm: Norm, cores: list[Tensor], needs: tuple[bool, bool]
) -> tuple[Work, list[Tensor]]:
    """The work of all gradients, and what it reads."""
    rows, stride = rows_of(x)
    flat, grad_stride = rows_alike(grads)
    cores, (block, row, col) = alike(cores)
    problem = _problem(rows, stride, norm, cores, flat[0].dtype)
    turned = (block, col, row)  # of Cᵀ
    work = _work(problem, grad_stride, turned, len(grads), needs)
    return work, [*three(flat), rows, *_vectors(norm), *three(cores)]


def tiles(b: int, gradients: bool, count: int) -> Tiles:
    """As for one rotation; three share what they read best among more threads, on one H100."""
    chosen = rotate.tiles(b, 2, gradients)
    return chosen._replace(warps=8) if count > 2 and not gradients else chosen


@functools.lru_cache(maxsize=4096)
def _work(
    problem: Problem,
    grad_stride: int,
    core_strides: tuple[int, int, int],
    grads: int,
    needs: tuple[bool, ...],
) -> Work:
    """Chooses tiles and runs; ``needs`` says which gradients are wanted, and is empty forward."""
    rows, n, b, rotations, stride, dtypes, device = problem
    count = max(rotations, grads)
    chosen = tiles(b, bool(needs), count)
    programs, run, splits = cut(rows, n, chosen, device, max(grad_stride, stride, n * b))
    strides = (grad_stride, stride) if needs else (stride,)
    numbers = (rows, n, run, n * b, *strides, *core_strides)
    _, _, _, mean, _, weight, bias = (dtype is not None for dtype in dtypes)
    last: tuple[int | str, ...] = (PRECISION, chosen.stages == 0)
    if needs:
        last = (count > rotations, *needs, PRECISION)
    constants = (*layout(n, b, chosen), mean, weight, bias, count, *last)
    launch = Launch(backward if needs else forward, programs, numbers, constants, **options(chosen))
    return Work(launch, splits, triton.cdiv(n, chosen.pack))
