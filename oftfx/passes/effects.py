"""Which nodes of a torch-level graph others must not be moved across."""

import inspect
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from oftfx.nodes import body_of
from oftfx.sites import provider_of

_IN_PLACE = {getattr(operator, name) for name in dir(operator) if name.startswith("i")} - {
    operator.index,
    operator.indexOf,
    operator.inv,
    operator.invert,
    operator.is_,
    operator.is_not,
    operator.itemgetter,
}

_PLAIN = {operator.and_, operator.is_, operator.not_, operator.or_}


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
    """Whether a node may do so; of one that holds graphs, whether anything in them may.

    What hides others, such as a module that is no layer of those we know, counts as if it did.
    """
    target = node.target
    match node.op:
        case "placeholder" | "get_attr" | "output":
            return False
        case "call_method":
            return str(target).endswith("_") and str(target) != "__getitem__"
        case "call_module":
            root = node.graph.owning_module
            return root is None or provider_of(root.get_submodule(str(target))) is None
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):  # which of them is called, arguments tell
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, torch._ops.HigherOrderOperator):
        bodies = list(_bodies(node))
        nodes = [inner for body in bodies for inner in body.graph.nodes]
        return not bodies or any(writes(inner) and not _is_local(inner) for inner in nodes)
    if target in _PLAIN:
        return False
    named = getattr(target, "__name__", "_").endswith("_")
    given = _given(node)
    flagged = bool(given.get("inplace")) or given.get("out") is not None
    return named or flagged or target in _IN_PLACE or target is operator.setitem


def _given(node: fx.Node) -> Mapping[str, Any]:
    """What a function is given, by name where it says how its parameters are called."""
    assert callable(node.target)
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (ValueError, TypeError):  # a builtin says nothing, and takes no such flag by position
        return node.kwargs
    return {**given.arguments, **node.kwargs}


def _bodies(node: fx.Node) -> Iterator[fx.GraphModule]:
    """The graphs that a higher-order op runs: what a 4-bit layer's own function is traced to."""
    for given in node.all_input_nodes:
        body = body_of(node.graph.owning_module, given)
        if body is not None:
            yield body


def _is_local(node: fx.Node) -> bool:
    """Whether what a node writes to is what an op just made, which nothing outside can see."""
    written = node.args[0] if node.args else None
    target = written.target if isinstance(written, fx.Node) else None
    return isinstance(target, torch._ops.OpOverload) and not any(
        result.alias_info for result in target._schema.returns
    )
