"""Rotations of one tensor become one op, which reads it once.

    before                          after
    x_q = rotate(x, C_q)            x_q, x_k, x_v = rotate_group(x, [C_q, C_k, C_v])
    x_k = rotate(x, C_k)
    x_v = rotate(x, C_v)

The three gradients of x then meet inside the op instead of being added to each other afterwards.
Rotations by one core become one rotation.
"""

import operator
from typing import Any

from torch import fx

from oftfx.ops.rotate import ROTATE
from oftfx.ops.rotate_group import ROTATE_GROUP
from oftfx.passes.effects import epochs
from oftfx.passes.pattern import is_block_rotation, value_of


def group(graph: fx.GraphModule) -> int:
    """Groups the rotations of each tensor; returns how many ops that saved."""
    place = {node: i for i, node in enumerate(graph.graph.nodes)}
    groups: dict[Any, list[fx.Node]] = {}
    for node, epoch in epochs(graph.graph).items():  # of two of them, x may be two tensors
        if not is_block_rotation(node):
            continue
        x, core, *_ = node.args
        value = value_of(core)
        if value is not None:
            groups.setdefault((epoch, source(x), value.shape, value.dtype), []).append(node)
    saved = 0
    for nodes in groups.values():
        together = [node for node in nodes if place[node.args[1]] < place[nodes[0]]]
        if len(together) > 1:
            _group(graph.graph, together)
            saved += len(together) - 1
    return saved


def source(x: Any) -> Any:
    """Equal for nodes of one value: autocast casts the tensor anew for every reader."""
    if x.op == "call_method" and x.target == "to" and not x.kwargs:
        return (source(x.args[0]), *x.args[1:])
    return x


def _group(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    x, cores = nodes[0].args[0], list(dict.fromkeys(node.args[1] for node in nodes))
    with graph.inserting_before(nodes[0]):
        if len(cores) == 1:
            outs = [graph.call_function(ROTATE, (x, *cores))]
        else:
            turned = graph.call_function(ROTATE_GROUP, (x, cores))
            outs = [graph.call_function(operator.getitem, (turned, i)) for i in range(len(cores))]
    by_core = dict(zip(cores, outs, strict=True))
    for node in nodes:
        out = by_core[node.args[1]]
        out.meta = node.meta
        node.replace_all_uses_with(out)
        graph.erase_node(node)
