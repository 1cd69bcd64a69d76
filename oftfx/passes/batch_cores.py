"""All cores of a graph in one launch.

    before                                  after
    C_1 = cayley(theta_1, b, k)             C = cayley(cat(theta_1 … theta_n), b, k)
    …                                       C_1, … C_n = split(C)
    C_n = cayley(theta_n, b, k)

for parameters of one block size, order, dtype and device that the graph reads as inputs, in one
unit: what is done to each of them before, such as the factor of ``unit_rate``, is done to all. On a
GPU, where a kernel takes so many parameters where they lie and nothing is done to them before:

    C_1, … C_n = cayley_each([theta_1 … theta_n], b, k)

Their gradients are then not copied beside one another either. What has more parameters than a
launch takes, such as a whole model, has several. All are at the graph's beginning, where what turns
one tensor finds the cores of other sites, too; those of a region with gradients in a graph without
are at the first of them. A parameter that the graph itself writes to is left.
"""

import itertools
import operator
from typing import Any, TypeAlias

import torch
from torch import fx

from oftfx.ops.cayley import CAYLEY
from oftfx.ops.cayley_each import CAYLEY_EACH, MOST, served
from oftfx.passes.effects import writes

UNITS = (operator.mul, "float")

Readers: TypeAlias = dict[fx.Node, list[fx.Node]]
"""Of each parameter the ops that make its core: sites that share a rotation each ask for it."""


def batch_cores(graph: fx.GraphModule) -> int:
    """Batches every `oftfx::cayley` of inputs; returns how many ops that saved."""
    batches: dict[Any, Readers] = {}
    beginning = next(
        node for node in graph.graph.nodes if node.op not in ("placeholder", "get_attr")
    )
    reopened = _reopened(graph.graph)
    for node in graph.graph.find_nodes(op="call_function", target=CAYLEY):
        (given,), (block_size, order) = node.all_input_nodes, node.args[1:]
        theta, units = _parameter(given)
        value = theta.meta.get("example_value")
        held = theta.op in ("placeholder", "get_attr") and not any(map(writes, theta.users))
        if held and value is not None and value.dim() == 2:
            kind = (block_size, order, units, value.dtype, value.device, node in reopened)
            batches.setdefault(kind, {}).setdefault(theta, []).append(node)
    saved = 0
    for (block_size, order, units, *_, late), readers in batches.items():
        nodes = sum(map(len, readers.values()))
        if nodes == 1:
            continue
        each = not units and _served(next(iter(readers)), block_size, order)
        most = MOST if each else len(readers)
        begins = range(0, len(readers), most)
        for begin in begins:
            batch = dict(itertools.islice(readers.items(), begin, begin + most))
            beginning = _first_call(graph.graph)  # anew: it may be a core that was batched before
            for theta in batch:
                if theta.op == "get_attr":  # read where it was first used, perhaps far below
                    beginning.prepend(theta)
            place = next(iter(batch.values()))[0] if late else beginning
            with graph.graph.inserting_before(place):
                _batch(graph.graph, batch, block_size, order, units, each)
        saved += nodes - len(begins)
    return saved


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))


def _reopened(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that have a gradient, of a graph that begins without."""
    found: set[fx.Node] = set()
    begins = enabled = torch.is_grad_enabled()
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif enabled and not begins:
            found.add(node)
    return found


def _parameter(node: fx.Node) -> tuple[fx.Node, tuple[Any, ...]]:
    """The parameter behind casts and factors, and those, as they are applied."""
    units: list[Any] = []
    while node.target in UNITS and len(node.all_input_nodes) == 1:
        units.insert(0, (node.op, node.target, node.args[1:]))
        node = node.all_input_nodes[0]
    return node, tuple(units)


def _batch(
    graph: fx.Graph,
    readers: Readers,
    block_size: int,
    order: int | None,
    units: tuple[Any, ...],
    each: bool,
) -> None:
    thetas = list(readers)
    sizes = [theta.meta["example_value"].shape[0] for theta in thetas]
    if each:
        shares = graph.call_function(CAYLEY_EACH, (thetas, block_size, order))
    else:
        stacked = graph.call_function(torch.cat, (thetas,))
        for op, target, args in units:
            stacked = graph.create_node(op, target, (stacked, *args))
        core = graph.call_function(CAYLEY, (stacked, block_size, order))
        shares = graph.call_function(torch.split, (core, sizes))
    cores = [graph.call_function(operator.getitem, (shares, i)) for i in range(len(thetas))]
    for core, own in zip(cores, readers.values(), strict=True):
        for node in own:
            (given,) = node.all_input_nodes
            core.meta = node.meta
            node.replace_all_uses_with(core)
            graph.erase_node(node)
            _erase_units(graph, given)


def _served(theta: fx.Node, block_size: int, order: int | None) -> bool:
    """Whether a GPU's kernel takes such parameters where they lie."""
    value = theta.meta["example_value"]
    return value.device.type == "cuda" and served([value], block_size, order)


def _erase_units(graph: fx.Graph, node: fx.Node) -> None:
    """Erases the casts and factors that nothing uses any more."""
    if node.target in UNITS and not node.users:
        (before,) = node.all_input_nodes
        graph.erase_node(node)
        _erase_units(graph, before)
