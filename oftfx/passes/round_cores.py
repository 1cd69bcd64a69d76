"""Cores that meet nothing but activations in 16 bits are made in 16 bits.

    before                                after
    C = cayley(theta, b, k)               C = rounded_cayley(theta, b, k, bfloat16)
    y = rotate(x, C)                      y = rotate(x, C)

for x in bfloat16, where a kernel gains by it (see `oftfx::rounded_cayley`). Every reader of C is a
rotation, by itself or of a share of C. All cores of one `oftfx::cayley_each` are rounded, or none.
"""

import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from oftfx.ops.cayley import CAYLEY
from oftfx.ops.cayley_each import CAYLEY_EACH
from oftfx.ops.rotate import ROTATE
from oftfx.ops.rounded_cayley import ROUNDED_CAYLEY, served

SHARES = (operator.getitem, torch.split)


def round_cores(graph: fx.GraphModule) -> int:
    """Rounds what it can of `oftfx::cayley`; returns how many ops."""
    rounded = 0
    for node in graph.graph.find_nodes(op="call_function", target=CAYLEY_EACH):
        dtype = _dtype(node)
        if dtype is not None:
            node.args = (*node.args[:3], dtype)
            _recast(node, dtype)
            rounded += 1
    for node in graph.graph.find_nodes(op="call_function", target=CAYLEY):
        theta, block_size, order = node.args
        dtype = _dtype(node)
        if order is None or dtype is None:
            continue
        with graph.graph.inserting_before(node):
            given = (theta, block_size, order, dtype)
            core = graph.graph.call_function(ROUNDED_CAYLEY, given)
        core.meta = node.meta
        node.replace_all_uses_with(core)
        graph.graph.erase_node(node)
        _recast(core, dtype)
        rounded += 1
    return rounded


def _dtype(core: fx.Node) -> torch.dtype | None:
    """Of all that a core turns, if it is one that cores are rounded to."""
    values = list(_turned(core))
    first = values[0] if values else None
    if first is None or any(value is None or value.dtype != first.dtype for value in values):
        return None
    return first.dtype if served(first.dtype, first.device) else None


def _turned(core: fx.Node) -> Iterator[Tensor | None]:
    """What each of a core's readers turns; None for one that is no rotation."""
    for user in core.users:
        x = user.args[0]
        if user.target in SHARES:
            yield from _turned(user)
        elif user.target == ROTATE and isinstance(x, fx.Node):
            yield x.meta.get("example_value")
        else:
            yield None


def _recast(core: fx.Node, dtype: torch.dtype) -> None:
    """Tells what reads a core, or a share of it, of its new dtype."""
    value = core.meta.get("example_value")
    if isinstance(value, Tensor):
        core.meta = {**core.meta, "example_value": value.to(dtype)}
    for user in core.users:
        if user.target in SHARES:
            _recast(user, dtype)
