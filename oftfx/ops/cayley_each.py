"""`oftfx::cayley_each`: the cores of several sites at once, none copied beside the others.

    before                                    after
    C = cayley(stack(theta_1 … theta_n))      C_1 … C_n = cayley_each(theta_1 … theta_n)
    C_1 … C_n = unbind(C)

On a CPU, where each copy takes memory anew from the system, page by page; and in a compiled layer
on a GPU, where a copy of the parameters and one of the cores' gradients are launches of their own.

There a kernel writes all cores into one tensor, `oftfx::cayley_joined`, and the forward hands that
one to the backward. It is an op by itself because the results of one op may not share memory, which
compilers rely on: `cayley_each` gives tensors of their own, and only its formula for autograd,
which a compiler sees op by op, cuts them out of a joined one.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.cayley import cayley, cayley_grad, core_dtype
from oftfx.ops.define import LIBRARY, call, define, differentiate
from oftfx.ops.kernels import kernels, on

MOST = 8
"""How many parameters a GPU's launch takes where they lie: a transformer layer has seven."""


def cayley_each(
    thetas: list[Tensor], block_size: int, order: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """[`cayley`][oftfx.ops.cayley] of each of several parameters.

    Args:
        thetas: Each (n, b(b−1)/2), of one dtype and device; n may differ.
        block_size: b.
        order: k of the Cayley–Neumann series.
        dtype: One of 16 bits, for cores as [`rounded_cayley`][oftfx.ops.rounded_cayley]'s.

    Returns:
        For each (n, b, b), float32 at least but where another dtype is asked for.
    """
    result: list[Tensor] = call(CAYLEY_EACH, thetas, block_size, order, dtype)
    return result


def served(thetas: Sequence[Tensor], block_size: int, order: int | None) -> bool:
    """Whether a kernel takes the parameters where they are; else a stack of them is as good.

    On a CPU any number of one shape, on a GPU up to `MOST`, (n, b(b−1)/2), b ≤ 64, any n of each.
    """
    return _kernels(thetas, block_size, order) is not None


def _kernels(thetas: Sequence[Tensor], block_size: int, order: int | None) -> Any:
    first = thetas[0]
    fast: Any = kernels("cayley_each", first.device)
    if fast is None or not fast.fits(first, block_size, order):
        return None
    fits_each = getattr(fast, "fits_each", _alike)
    return fast if fits_each(thetas, block_size) else None


def _alike(thetas: Sequence[Tensor], block_size: int) -> bool:
    first = thetas[0]
    return all(theta.shape == first.shape and theta.dtype == first.dtype for theta in thetas)


def _cayley_each(
    thetas: list[Tensor], block_size: int, order: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    fast = (_joining if dtype else _kernels)(thetas, block_size, order)
    if fast is None:
        return [_alone(theta, block_size, order, dtype) for theta in thetas]
    with on(thetas[0].device):
        result: list[Tensor] = fast.cayley_each(thetas, block_size, order, *_given(dtype))
    return result


def _given(dtype: torch.dtype | None) -> tuple[torch.dtype, ...]:
    """What only kernels that join cores are asked for."""
    return (dtype,) if dtype else ()


def _alone(theta: Tensor, block_size: int, order: int, dtype: torch.dtype | None) -> Tensor:
    return cayley(theta, block_size, order).to(dtype or core_dtype(theta))


CAYLEY_EACH = define(
    "cayley_each(Tensor[] thetas, int block_size, int order, ScalarType? dtype=None) -> Tensor[]",
    _cayley_each,
)


@torch.library.register_fake("oftfx::cayley_each", lib=LIBRARY)
def _(
    thetas: list[Tensor], block_size: int, order: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    shape, dtype = (block_size, block_size), dtype or core_dtype(thetas[0])
    return [theta.new_empty((*theta.shape[:-1], *shape), dtype=dtype) for theta in thetas]


def _cayley_joined(
    thetas: list[Tensor], block_size: int, order: int, dtype: torch.dtype | None = None
) -> Tensor:
    fast = _joining(thetas, block_size, order)
    if fast is None:
        return torch.cat([_alone(theta, block_size, order, dtype) for theta in thetas])
    with on(thetas[0].device):
        result: Tensor = fast.cayley_joined(thetas, block_size, order, *_given(dtype))
    return result


def _joining(thetas: Sequence[Tensor], block_size: int, order: int) -> Any:
    """The kernels that write all cores into one tensor, of any dtype, if there are for these."""
    fast = _kernels(thetas, block_size, order)
    return fast if hasattr(fast, "cayley_joined") else None


CAYLEY_JOINED = define(
    "cayley_joined(Tensor[] thetas, int block_size, int order, ScalarType? dtype=None) -> Tensor",
    _cayley_joined,
)
"""What `CAYLEY_EACH` gives, one behind the other: thetas (n, b(b−1)/2) to (sum of n, b, b)."""


@torch.library.register_fake("oftfx::cayley_joined", lib=LIBRARY)
def _(
    thetas: list[Tensor], block_size: int, order: int, dtype: torch.dtype | None = None
) -> Tensor:
    n = sum(theta.shape[0] for theta in thetas)
    return thetas[0].new_empty((n, block_size, block_size), dtype=dtype or core_dtype(thetas[0]))


def cayley_each_grad(
    grads: list[Tensor],
    thetas: list[Tensor],
    block_size: int,
    order: int,
    joined: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Gradients of [`cayley_each`][oftfx.ops.cayley_each]: each (n, b, b) to theta's shape.

    Args:
        grads: For each core its gradient; or, of one dimension more, the shares that it is the
            sum of, as the runs of a kernel found them.
        thetas: As forward.
        block_size: As forward.
        order: As forward.
        joined: The tensor that all cores are cut out of, if they are. No kernel reads it: a
            compiler that hands it to the backward anyway cuts the cores out of it there, too,
            and need not hand over each by itself.
        dtype: As forward.
    """
    given = (grads, thetas, block_size, order, joined, dtype)
    result: list[Tensor] = call(CAYLEY_EACH_GRAD, *given)
    return result


def _cayley_each_grad(
    grads: list[Tensor],
    thetas: list[Tensor],
    block_size: int,
    order: int,
    joined: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    joins = dtype or any(map(_in_shares, grads, thetas))
    fast = (_joining if joins else _kernels)(thetas, block_size, order)
    if fast is None:
        return of_each(grads, thetas, block_size, order)
    given = (grads, thetas, block_size, order, *_given(dtype))
    with on(thetas[0].device):
        result: list[Tensor] = fast.cayley_each_grad(*given)
    return result


def _in_shares(grad: Tensor, theta: Tensor) -> bool:
    return grad.dim() > theta.dim() + 1


def of_each(
    grads: list[Tensor],
    thetas: list[Tensor],
    block_size: int,
    order: int,
    joined: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Each gradient by itself: what is differentiated again."""
    whole = [
        grad.sum(0) if _in_shares(grad, theta) else grad
        for grad, theta in zip(grads, thetas, strict=True)
    ]
    return [
        cayley_grad(grad.to(core_dtype(theta)), theta, block_size, order)
        for grad, theta in zip(whole, thetas, strict=True)
    ]


CAYLEY_EACH_GRAD = define(
    "cayley_each_grad(Tensor[] grads, Tensor[] thetas, int block_size, int order, "
    "Tensor? joined=None, ScalarType? dtype=None) -> Tensor[]",
    _cayley_each_grad,
)


@torch.library.register_fake("oftfx::cayley_each_grad", lib=LIBRARY)
def _(
    grads: list[Tensor],
    thetas: list[Tensor],
    block_size: int,
    order: int,
    joined: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    return [theta.new_empty(theta.shape) for theta in thetas]


class _CayleyEach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block_size: int, order: int, dtype: torch.dtype | None, *thetas: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.block_size, ctx.order, ctx.dtype = block_size, order, dtype
        given = list(thetas)
        if _joining(given, block_size, order) is None:
            ctx.save_for_backward(None, *given)
            return tuple(call(CAYLEY_EACH, given, block_size, order, dtype))
        joined: Tensor = call(CAYLEY_JOINED, given, block_size, order, dtype)
        ctx.save_for_backward(joined, *given)
        # Slices, which partitioners make again in the backward; parts of a split they save.
        ends = itertools.accumulate(theta.shape[0] for theta in given)
        return tuple(
            joined[end - theta.shape[0] : end] for theta, end in zip(given, ends, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        joined, *thetas = ctx.saved_tensors
        given = (list(grads), thetas, ctx.block_size, ctx.order, joined, ctx.dtype)
        return None, None, None, *cayley_each_grad(*given)


def _apply(
    thetas: list[Tensor], block_size: int, order: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    return list(_CayleyEach.apply(block_size, order, dtype, *thetas))


def _apply_joined(
    thetas: list[Tensor], block_size: int, order: int, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.cat(_apply(thetas, block_size, order, dtype))


differentiate(CAYLEY_EACH, _apply)
differentiate(CAYLEY_JOINED, _apply_joined)
differentiate(CAYLEY_EACH_GRAD, of_each)
