"""Which nodes of a torch-level graph others must not be moved across."""

import operator
from typing import Any

import torch
from torch import fx

_IN_PLACE = {getattr(operator, name) for name in dir(operator) if name.startswith("i")} - {
    operator.index,
    operator.indexOf,
    operator.inv,
    operator.invert,
    operator.is_,
    operator.is_not,
    operator.itemgetter,
}


def barrier(node: fx.Node) -> bool:
    """Whether what is computed before a node may not be computed after it, nor the reverse.

    Because the node writes to a tensor, or because it begins or ends what has no gradient.
    """
    return writes(node) or node.target is torch._C._set_grad_enabled


def epochs(graph: fx.Graph) -> dict[Any, int]:
    """How many barriers come before each node: nodes of one epoch may be computed in any order."""
    found: dict[Any, int] = {}
    epoch = 0
    for node in graph.nodes:
        epoch += barrier(node)
        found[node] = epoch
    return found


def writes(node: fx.Node) -> bool:
    """Whether a node may do so; nodes that hide others, such as modules, count as if they did."""
    target = node.target
    match node.op:
        case "placeholder" | "get_attr" | "output":
            return False
        case "call_method":
            return str(target).endswith("_") and str(target) != "__getitem__"
        case "call_module":
            return True
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    named = getattr(target, "__name__", "_").endswith("_")
    flagged = bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
    return named or flagged or target in _IN_PLACE or target is operator.setitem
