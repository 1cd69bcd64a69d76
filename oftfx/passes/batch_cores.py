"""All cores of a graph in one launch.

    before                                  after
    C_1 = cayley(theta_1, b, k)             C = cayley(cat(theta_1 … theta_n), b, k)
    …                                       C_1, … C_n = split(C)
    C_n = cayley(theta_n, b, k)

for parameters of one block size, order, dtype and device that the graph reads as inputs, in one
unit: what is done to each of them before, such as the factor of ``unit_rate``, is done to all. On a
GPU, where a kernel takes so many parameters where they lie and nothing is done to them before:

    C_1, … C_n = cayley_each([theta_1 … theta_n], b, k)

Their gradients are then not copied beside one another either.
"""

import operator
from typing import Any

import torch
from torch import fx

from oftfx.ops.cayley_each import CAYLEY_EACH, served

CAYLEY = torch.ops.oftfx.cayley.default
UNITS = (operator.mul, "float")


def batch_cores(graph: fx.GraphModule) -> int:
    """Batches every `oftfx::cayley` of inputs; returns how many ops that saved."""
    batches: dict[Any, list[fx.Node]] = {}
    for node in graph.graph.find_nodes(op="call_function", target=CAYLEY):
        (given,), (block_size, order) = node.all_input_nodes, node.args[1:]
        theta, units = _parameter(given)
        value = theta.meta.get("example_value")
        if theta.op in ("placeholder", "get_attr") and value is not None and value.dim() == 2:
            kind = (block_size, order, units, value.dtype, value.device)
            batches.setdefault(kind, []).append(node)
    saved = 0
    for (block_size, order, units, *_), nodes in batches.items():
        if len(nodes) > 1:
            _batch(graph.graph, nodes, block_size, order, units)
            saved += len(nodes) - 1
    return saved


def _parameter(node: fx.Node) -> tuple[fx.Node, tuple[Any, ...]]:
    """The parameter behind casts and factors, and those, as they are applied."""
    units: list[Any] = []
    while node.target in UNITS and len(node.all_input_nodes) == 1:
        units.insert(0, (node.op, node.target, node.args[1:]))
        node = node.all_input_nodes[0]
    return node, tuple(units)


def _batch(
    graph: fx.Graph,
    nodes: list[fx.Node],
    block_size: int,
    order: int | None,
    units: tuple[Any, ...],
) -> None:
    # Sites that share a rotation each ask for its core.
    given = [node.all_input_nodes[0] for node in nodes]
    asked = [_parameter(node)[0] for node in given]
    thetas = list(dict.fromkeys(asked))
    sizes = [theta.meta["example_value"].shape[0] for theta in thetas]
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    for theta in thetas:
        if theta.op == "get_attr":  # read where it was first used, perhaps far below
            first.prepend(theta)
    with graph.inserting_before(first):
        if not units and _served(thetas, block_size, order):
            shares = graph.call_function(CAYLEY_EACH, (thetas, block_size, order))
        else:
            stacked = graph.call_function(torch.cat, (thetas,))
            for op, target, args in units:
                stacked = graph.create_node(op, target, (stacked, *args))
            core = graph.call_function(CAYLEY, (stacked, block_size, order))
            shares = graph.call_function(torch.split, (core, sizes))
        cores = [graph.call_function(operator.getitem, (shares, i)) for i in range(len(thetas))]
    by_theta = dict(zip(thetas, cores, strict=True))
    for node, theta in zip(nodes, asked, strict=True):
        share = by_theta[theta]
        share.meta = node.meta
        node.replace_all_uses_with(share)
        graph.erase_node(node)
    for node in dict.fromkeys(given):
        _erase_units(graph, node)


def _served(thetas: list[fx.Node], block_size: int, order: int | None) -> bool:
    """Whether a GPU's kernel takes the parameters where they lie."""
    values = [theta.meta["example_value"] for theta in thetas]
    return values[0].device.type == "cuda" and served(values, block_size, order)


def _erase_units(graph: fx.Graph, node: fx.Node) -> None:
    """Erases the casts and factors that nothing uses any more."""
    if node.target in UNITS and not node.users:
        (before,) = node.all_input_nodes
        graph.erase_node(node)
        _erase_units(graph, before)
