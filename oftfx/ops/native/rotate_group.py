"""Rotations of one tensor by several cores, and their gradients, in one pass each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from oftfx.ops.native.binding import addresses, call, numbers

STEP, LARGEST = 16, 256
"""Block sizes: whole vectors, or PyTorch is as fast; and what the caches hold."""

MOST = 8
"""Rotations of one tensor that one call takes, as in `kernels.c`."""

FACTORS = 4
"""Tensors besides the first that one call multiplies, as in `kernels.c`."""


def fits(x: Tensor, cores: Sequence[Tensor], grads: Sequence[Tensor] = ()) -> bool:
    """Whether the kernels take these: float32, and blocks of a width that pays."""
    first = cores[0]
    return (
        x.dtype == torch.float32
        and first.shape[-1] % STEP == 0
        and first.shape[-1] <= LARGEST
        and len(cores) <= MOST
        and all(core.shape == first.shape for core in cores)
        and all(grad.dtype == x.dtype for grad in grads)
    )


def rotate_group(x: Tensor, cores: list[Tensor]) -> list[Tensor]:
    """`oftfx::rotate_group`: x (..., n·b) and cores (n, b, b), from one reading of x."""
    x, cores = _plain(x), [_plain(core) for core in cores]
    outs = [torch.empty_like(x) for _ in cores]
    sizes, operations = _sizes(x, cores)
    call("rotate", operations, x.data_ptr(), addresses(cores), addresses(outs), *sizes)
    return outs


def rotate_group_grad(
    grads: list[Tensor],
    x: Tensor,
    cores: list[Tensor],
    need_x: bool,
    need_cores: bool,
    factors: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor]]:
    """`oftfx::rotate_group_grad`: all gradients from one reading of ``grads`` and x.

    Args:
        grads: For each core, of x's shape.
        x: (..., n·b); what was rotated, or its first factor.
        cores: Each (n, b, b).
        need_x: Whether the gradient of what was rotated is wanted.
        need_cores: Whether those of the cores are.
        factors: What x is multiplied by first: matrices (rows, n·b), one number a row or a column.
    """
    given = cores
    x, cores, grads = _plain(x), [_plain(c) for c in cores], [_plain(grad) for grad in grads]
    out = torch.empty_like(x) if need_x else x.new_empty(0)
    grams = [torch.empty_like(core) if need_cores else core.new_empty(0) for core in cores]
    sizes, operations = _sizes(x, cores)
    if need_x or need_cores:
        call(
            "rotate_grad",
            2 * operations,
            addresses(grads),
            x.data_ptr(),
            addresses(factors),
            numbers([factor.stride(0) for factor in factors]),
            numbers([factor.stride(1) for factor in factors]),
            addresses(cores),
            out.data_ptr() if need_x else None,
            addresses(grams) if need_cores else None,
            len(factors),
            *sizes,
        )
    return out, [gram.to(core.dtype) for gram, core in zip(grams, given, strict=True)]


def _sizes(x: Tensor, cores: Sequence[Tensor]) -> tuple[tuple[int, ...], int]:
    """How many cores, rows and blocks, their width; and the operations of the products."""
    n, b, _ = cores[0].shape
    # One core for every block, (1, b, b), finds each of them as a row of its own.
    rows = x.numel() // (n * b) if n else 0
    return (len(cores), rows, n, b), 2 * len(cores) * x.numel() * b


def _plain(tensor: Tensor) -> Tensor:
    # Asking costs half of what calls that change nothing do.
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()
