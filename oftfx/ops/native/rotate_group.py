"""Rotations of one tensor by several cores, and their gradients, in one pass each."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from oftfx.ops.native.binding import call

STEP, LARGEST = 16, 256
"""Block sizes: whole vectors, or PyTorch is as fast; and what the caches hold."""

MOST = 8
"""Rotations of one tensor that one call takes, as in `kernels.c`."""

FACTORS = 4
"""Tensors besides the first that one call multiplies, as in `kernels.c`."""


def fits(x: Tensor, cores: Sequence[Tensor], grads: Sequence[Tensor] = ()) -> bool:
    """Whether the kernels take these: float32, and blocks of a width that pays."""
    shape, dtype = cores[0].shape, torch.float32
    width = shape[-1]
    if x.dtype is not dtype or width % STEP or width > LARGEST or len(cores) > MOST:
        return False
    # Loops, here and below, since a generator costs more than all it would look at.
    for core in cores[1:]:
        if core.shape != shape:
            return False
    for grad in grads:  # noqa: SIM110
        if grad.dtype is not dtype:
            return False
    return True


def rotate_group(x: Tensor, cores: Sequence[Tensor]) -> list[Tensor]:
    """`oftfx::rotate_group`: x (..., n·b) and cores (n, b, b), from one reading of x."""
    x, *cores = plain(x, *cores)
    outs = [torch.empty_like(x) for _ in cores]
    call("rotate", *_sizes(x, cores), *addresses(x, *cores, *outs))
    return outs


Strided: TypeAlias = tuple[int, int, int]
"""A matrix as the kernels read it: where its first number is, and the steps down and along it."""


def rotate_group_grad(
    grads: Sequence[Tensor],
    x: Tensor,
    cores: Sequence[Tensor],
    need_x: bool,
    need_cores: bool,
    factors: Sequence[Strided] = (),
    normed: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """`oftfx::rotate_group_grad`: all gradients from one reading of ``grads`` and x.

    Args:
        grads: For each core, of x's shape.
        x: (..., n·b); what was rotated, or its first factor.
        cores: Each (n, b, b).
        need_x: Whether the gradient of what was rotated is wanted.
        need_cores: Whether those of the cores are.
        factors: What x is multiplied by first: matrices (rows, n·b), which their owner keeps.
        normed: They are the norm of x; its gradient is wanted, not that of what was rotated.
    """
    given = cores
    x, *held = plain(x, *grads, *cores)
    cores = held[len(grads) :]
    out = torch.empty_like(x) if need_x else x.new_empty(0)
    grams = [torch.empty_like(core) if need_cores else core.new_empty(0) for core in cores]
    if need_x or need_cores:
        by = chain.from_iterable(factors)
        wanted = x.data_ptr(), out.data_ptr() if need_x else 0, need_cores
        operands = addresses(*held, *grams)
        call("rotate_grad", *_sizes(x, cores), *wanted, *operands, normed, len(factors), *by)
    for i, core in enumerate(given):
        if core.dtype is not torch.float32:
            grams[i] = grams[i].to(core.dtype)
    return out, grams


def _sizes(x: Tensor, cores: Sequence[Tensor]) -> tuple[int, ...]:
    """The operations of the products with x; how many cores, rows and blocks, and their width."""
    n, b, _ = cores[0].shape
    # One core for every block, (1, b, b), finds each of them as a row of its own.
    numel = x.numel()
    rows = numel // (n * b) if n else 0
    return 2 * len(cores) * numel * b, len(cores), rows, n, b


def addresses(*tensors: Tensor) -> Iterable[int]:
    """Where they are."""
    return map(Tensor.data_ptr, tensors)


def plain(*tensors: Tensor) -> Sequence[Tensor]:
    """The tensors as the kernels read them: float32, contiguous."""
    # Asking costs half of what calls that change nothing do.
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_contiguous():
            return [each.to(torch.float32).contiguous() for each in tensors]
    return tensors
