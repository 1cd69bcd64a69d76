"""`oftfx::givens`: pairs of coordinates mapped in a tree, and its gradients.

    coordinates   0 1 2 3 4 5 6
    stage 1      (0 1)(2 3)(4 5) 6      a pair's second coordinate is finished, its first goes on,
    stage 2      (0   2)  (4    6)      and so does an odd one that found no partner
    stage 3      (0        4)

Stage s holds half as many coordinates as the one before, so all stages together read no more than
2d numbers a row. The backward computes them again from x instead of keeping them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.define import LIBRARY, call, define, differentiate
from oftfx.ops.kernels import kernels, on
from oftfx.ops.precision import as_given


def givens(x: Tensor, core: Tensor, transposed: bool = False) -> Tensor:
    """``x·S_1·S_2 …``, each stage a block-diagonal matrix of 2×2 blocks ``I + C``.

    Args:
        x: (..., d), floating.
        core: (d − 1, 2, 2), the residual blocks, stage by stage and in a stage by coordinate;
            a row (x_i, x_j) becomes (x_i, x_j)·(I + C).
        transposed: The transpose of the whole map.

    Returns:
        (..., d) in x's dtype, contiguous; the stages are computed in at least float32.

    Raises:
        RuntimeError: The width of x is not one more than the number of blocks.
    """
    result: Tensor = call(GIVENS, x, core, transposed)
    return result


def _givens(x: Tensor, core: Tensor, transposed: bool = False) -> Tensor:
    _check(x, core)
    fast = kernels("givens", x.device)
    if fast is None or not fast.fits(x, core):
        return _run(x, core, transposed)
    with on(x.device):
        result: Tensor = fast.givens(x, core, transposed)
    return result


def of_aten(x: Tensor, core: Tensor, transposed: bool = False) -> Tensor:
    """[`givens`][oftfx.ops.givens] of PyTorch's own ops, none in place: as a tracer wants it."""
    count = x.shape[-1] // 2
    if count == 0:
        return x
    pairs, alone = x[..., : 2 * count].unflatten(-1, (count, 2)), x[..., 2 * count :]
    if not transposed:
        pairs = _mapped(pairs, core[:count])
    inner = of_aten(torch.cat((pairs[..., 0], alone), -1), core[count:], transposed)
    pairs = torch.stack((inner[..., :count], pairs[..., 1]), -1)
    if transposed:
        pairs = _mapped(pairs, core[:count].mT)
    return torch.cat((pairs.flatten(-2), inner[..., count:]), -1)


def _mapped(pairs: Tensor, core: Tensor) -> Tensor:
    """Pairs (..., n, 2) by their blocks (n, 2, 2)."""
    wide = torch.promote_types(pairs.dtype, torch.float32)
    p, c = pairs.to(wide), core.to(wide)
    return (p + (p[..., :1] * c[:, 0] + p[..., 1:] * c[:, 1])).to(pairs.dtype)


GIVENS = define("givens(Tensor x, Tensor core, bool transposed=False) -> Tensor", _givens)


@torch.library.register_fake("oftfx::givens", lib=LIBRARY)
def _(x: Tensor, core: Tensor, transposed: bool = False) -> Tensor:
    torch._check(_fits(x, core), lambda: _misfit(x, core))
    return x.new_empty(x.shape)


def givens_grad(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Both gradients of [`givens`][oftfx.ops.givens]; one that is not needed comes back empty.

    Args:
        grad: (..., d), the gradient of the result.
        x: (..., d), what was mapped.
        core: (d − 1, 2, 2).
        need_x: Whether the gradient of x is wanted.
        need_core: Whether the gradient of the core is wanted.
        transposed: As for `givens`.

    Returns:
        (..., d) in x's dtype and (d − 1, 2, 2) in the core's.
    """
    result: tuple[Tensor, Tensor] = call(GIVENS_GRAD, grad, x, core, need_x, need_core, transposed)
    return result


def _givens_grad(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    fast = kernels("givens", x.device)
    if fast is None or not fast.fits(x, core):
        return _in_stages(grad, x, core, need_x, need_core, transposed)
    with on(x.device):
        result: tuple[Tensor, Tensor] = fast.givens_grad(
            grad, x, core, need_x, need_core, transposed
        )
    return result


GIVENS_GRAD = define(
    "givens_grad(Tensor grad, Tensor x, Tensor core, bool need_x, bool need_core, "
    "bool transposed=False) -> (Tensor, Tensor)",
    _givens_grad,
)


@torch.library.register_fake("oftfx::givens_grad", lib=LIBRARY)
def _(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(x.shape if need_x else 0), core.new_empty(core.shape if need_core else 0)


def stages(width: int) -> Iterator[tuple[int, slice]]:
    """Every stage: how far apart the coordinates of its pairs are, and its blocks."""
    step, first = 1, 0
    while step < width:
        pairs = len(range(step, width, 2 * step))
        yield step, slice(first, first + pairs)
        step, first = 2 * step, first + pairs


def _run(
    x: Tensor, core: Tensor, transposed: bool, read: dict[int, Tensor] | None = None
) -> Tensor:
    """The result; ``read`` is given what each stage reads, its pairs (..., pairs, 2), by its step.

    Stages run in place on one new tensor.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.clone(memory_format=torch.contiguous_format)
    order = list(stages(x.shape[-1]))
    for step, blocks in reversed(order) if transposed else order:
        firsts = slice(0, 2 * step * (blocks.stop - blocks.start), 2 * step)
        seconds = slice(step, None, 2 * step)
        pairs = torch.stack((y[..., firsts], y[..., seconds]), -1)
        if read is not None:
            read[step] = pairs
        c = core[blocks].to(wide)
        if transposed:
            c = c.mT
        # Sums of two products, spelled out: a batched matmul of 2×2 blocks is far slower.
        a, b = pairs.to(wide).unbind(-1)
        y[..., firsts] = a + (a * c[:, 0, 0] + b * c[:, 1, 0])
        y[..., seconds] = b + (a * c[:, 0, 1] + b * c[:, 1, 1])
    return y


@as_given
def _in_stages(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """The transposed map of the gradient meets, stage by stage, the gradients of each result."""
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    turned = _run(grad, core, not transposed, outputs)
    grad_x = turned if need_x else grad.new_empty(0)
    if not need_core:
        return grad_x, core.new_empty(0)
    _run(x, core, transposed, inputs)
    grams = [
        torch.bmm(_by_pair(inputs[step]).mT, _by_pair(outputs[step])).to(core.dtype)
        for step, _ in stages(x.shape[-1])
    ]
    grad_core = torch.cat([core.new_empty(0, 2, 2), *grams])
    return grad_x, grad_core.mT.contiguous() if transposed else grad_core


def _by_pair(pairs: Tensor) -> Tensor:
    """(..., pairs, 2) as (pairs, rows, 2)."""
    return pairs.reshape(-1, *pairs.shape[-2:]).transpose(0, 1)


def _fits(x: Tensor, core: Tensor) -> bool:
    return core.shape[1:] == (2, 2) and x.shape[-1] == core.shape[0] + 1


def _misfit(x: Tensor, core: Tensor) -> str:
    return (
        f"oftfx::givens: x of shape {tuple(x.shape)} does not fit a core of shape "
        f"{tuple(core.shape)}: they must be (..., d) and (d − 1, 2, 2)."
    )


def _check(x: Tensor, core: Tensor) -> None:
    """In every launch's way, so without `torch._check`, which costs more than a launch."""
    if not _fits(x, core):
        raise RuntimeError(_misfit(x, core))


class _Givens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, core: Tensor, transposed: bool = False) -> Tensor:
        ctx.save_for_backward(x, core)
        ctx.transposed = transposed
        result: Tensor = call(GIVENS, x, core, transposed)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, core = ctx.saved_tensors
        need_x, need_core = ctx.needs_input_grad[:2]
        grad_x, grad_core = givens_grad(grad, x, core, need_x, need_core, ctx.transposed)
        return grad_x if need_x else None, grad_core if need_core else None, None


differentiate(GIVENS, _Givens.apply)
differentiate(GIVENS_GRAD, _in_stages)
