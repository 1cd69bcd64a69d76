"""What a backward keeps of its input: of a product its factors, which autograd keeps anyway.

    h = silu(gate)·up                   keeps silu(gate) and up
    n = weight·(h·rstd)                 of a frozen weight: keeps weight, h and rstd
    y = linear(rotate(x, core), W)      keeps the core, and would keep x besides

The product of a gated MLP is the widest input of a layer, so making it again saves most of what
rotations keep; in a compiled graph the partitioner does the same.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def kept(x: Tensor) -> tuple[Tensor, ...]:
    """The tensors to save for [`again`][oftfx.ops.kept.again]: x, or the factors of the product.

    Args:
        x: An operand of an `autograd.Function`, as its forward gets it.
    """
    # A write to x is not in what hooks keep in place of a tensor.
    if type(x) is not Tensor or x.grad_fn is None or x._version or watched():
        return (x,)
    try:
        return _factors(x.grad_fn, x.dtype) or (x,)
    except UnreadableError:
        return (x,)


def _factors(product: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a node multiplied, in that order; nothing where it is no product, or not all is kept."""
    if product is None or product.name() != "MulBackward0":
        return ()
    a, b = saved(product, "self"), saved(product, "other")
    if a is not None and b is not None:
        return (a, b) if a.dtype == b.dtype == dtype else ()
    # A frozen factor's partner is not kept, but may be a product itself.
    frozen, partner = (a, 1) if b is None else (b, 0)
    if frozen is None or frozen.dtype != dtype:
        return ()
    inner = _factors(product.next_functions[partner][0], dtype)
    return (*inner, frozen) if inner else ()


def again(saved: Sequence[Tensor]) -> Tensor:
    """The x that [`kept`][oftfx.ops.kept.kept] gave these for, to the bit."""
    return math.prod(saved[1:], start=saved[0])


class UnreadableError(RuntimeError):
    """A node's tensor was written to or let go of, or hooks keep it; never leaves this package."""


def saved(node: Any, name: str) -> Any:
    """What a node of autograd's graph keeps under a name; None where it keeps nothing.

    Raises:
        UnreadableError: It is not to be had as it was.
    """
    kept_by_hooks = getattr(getattr(node, f"_raw_saved_{name}"), "unpack_hook", None)
    if kept_by_hooks is not None:  # to ask them may be dear, and would give another tensor
        raise UnreadableError
    try:
        return getattr(node, f"_saved_{name}")
    except RuntimeError as error:  # then nothing will ask for this gradient
        raise UnreadableError from error


def watched() -> bool:
    """Whether hooks see the tensors that autograd saves now, as checkpointing and offloading do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
