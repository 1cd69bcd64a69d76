"""What a backward keeps of its input: of a product its factors, which autograd keeps anyway.

    h = silu(gate)·up                   keeps silu(gate) and up
    y = linear(rotate(h, core), W)      keeps the core, and would keep h besides

The product of a gated MLP is the widest input of a layer, so making it again saves most of what
rotations keep; in a compiled graph the partitioner does the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def kept(x: Tensor) -> tuple[Tensor, ...]:
    """The tensors to save for [`again`][oftfx.ops.kept.again]: x, or the factors of the product.

    Args:
        x: An operand of an `autograd.Function`, as its forward gets it.
    """
    node = x.grad_fn
    if type(x) is not Tensor or node is None or node.name() != "MulBackward0":
        return (x,)
    # What hooks keep in place of a tensor may be dear to look at, and a write to x is not in them.
    if x._version or watched():
        return (x,)
    product: Any = node
    try:
        factors = product._saved_self, product._saved_other
    except RuntimeError:  # they were written to, or let go of: nothing will ask for this gradient
        return (x,)
    return (x,) if any(factor is None for factor in factors) else factors


def again(saved: Sequence[Tensor]) -> Tensor:
    """The x that [`kept`][oftfx.ops.kept.kept] gave these for, to the bit."""
    x, *others = saved
    return x * others[0] if others else x


def watched() -> bool:
    """Whether hooks see the tensors that autograd saves now, as checkpointing and offloading do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
