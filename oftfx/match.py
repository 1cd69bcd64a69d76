"""Graphs → every use of a parameter, and which of them are matmuls that a rotation fits.

A *use* is one node that reads one parameter. Its *owner* is the module whose code reads it, told
by the call stack that the tracer recorded; that keeps tied weights apart.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from oftfx.capture import Capture
from oftfx.nodes import CAST_NOTE, behind, body_of
from oftfx.sites import matmul, provider_of
from oftfx.sites.matmul import Layout
from oftfx.sites.naming import caller


@dataclass(frozen=True, eq=False)
class Use:
    """One node that reads a parameter.

    Attributes:
        graph: The graph module the node is in.
        node: The reading node.
        weight: Name of the parameter, as its owner calls it.
        owner: fqn of the module that reads it.
        x: The activation it is multiplied with; None when this is no matmul x·W.
        source: The tensor x is a view of; equal for nodes that read the same tensor.
        layout: How W is stored: (out, in) or (in, out).
        why_not: For a use that no rotation fits, what it is.
    """

    graph: fx.GraphModule
    node: fx.Node
    weight: str
    owner: str
    x: fx.Node | None = None
    source: fx.Node | None = None
    layout: Layout = "out_in"
    why_not: str = ""

    def feed(self, x: fx.Node) -> None:
        """Gives the matmul another input."""
        spelled = matmul.spelling(self.node)
        if spelled is None:  # call_module: the input is its first argument
            matmul.Operand(0, "input").replace(self.node, x)
        else:
            spelled.x.replace(self.node, x)


def uses(capture: Capture) -> list[Use]:
    """Every use of every parameter, in the order of the graphs."""
    return [use for graph in capture.graphs for use in _graph_uses(capture, graph)]


def _graph_uses(capture: Capture, graph: fx.GraphModule) -> Iterator[Use]:
    for node in graph.graph.nodes:
        if node.op == "call_module":
            yield from _module_uses(capture, graph, node)
            continue
        if node.op in ("placeholder", "get_attr", "output") or matmul.is_view_of_weight(node):
            continue
        if node.target is CAST_NOTE:
            continue
        if any(body_of(graph, argument) for argument in node.all_input_nodes):
            continue  # a higher-order op: what reads the parameter is in its body
        spelled = matmul.spelling(node)
        for read in node.all_input_nodes:
            start, swapped = matmul.parameter_behind(read)
            name = capture.parameters.get(start)
            if name is None:
                continue
            owner = caller(node)
            weight = _as_owner_calls_it(capture.aliases[name], owner, start)
            x = spelled.x.of(node) if spelled and spelled.w.of(node) is read else None
            if spelled is None or x is None:
                left = spelled is not None and spelled.x.of(node) is read
                why_not = _describe(node) + (", from the left" if left else "")
                yield Use(graph, node, weight, owner, why_not=why_not)
            elif capture.tensors[name].dim() != 2:
                why_not = f"{capture.tensors[name].dim()}-D weight of {_describe(node)}"
                yield Use(graph, node, weight, owner, why_not=why_not)
            else:
                layout: Layout = "out_in" if spelled.out_in != swapped else "in_out"
                yield Use(graph, node, weight, owner, x, matmul.tensor_behind(x), layout)


def _module_uses(capture: Capture, graph: fx.GraphModule, node: fx.Node) -> Iterator[Use]:
    """A symbolic trace keeps leaf modules as calls: all their parameters are read there."""
    owner = str(node.target)
    module = graph.get_submodule(owner)
    provider = provider_of(module)
    for name, tensor in module.named_parameters():
        weight = f"{owner}.{name}"
        if provider is not None and name == "weight" and tensor.dim() == 2:
            x = matmul.Operand(0, "input").of(node)
            assert x is not None, f"{node} has no tensor input"
            yield Use(graph, node, weight, owner, x, matmul.tensor_behind(x), provider.LAYOUT)
        else:
            yield Use(graph, node, weight, owner, why_not=type(module).__name__)


def _as_owner_calls_it(aliases: tuple[str, ...], owner: str, start: fx.Node) -> str:
    """Of a tied parameter's names, the one that the reading module knows it by."""
    if len(aliases) == 1:
        return aliases[0]
    if start.op == "get_attr" and start.target in aliases:
        return str(start.target)
    for alias in aliases:
        holder = alias.rpartition(".")[0]
        if owner and (holder == owner or holder.endswith("." + owner)):
            return alias
    return aliases[0]


def _describe(node: fx.Node) -> str:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return f"`{name.removesuffix('.default')}`{line_of(node)}"


def line_of(node: fx.Node) -> str:
    """The user's line that made a node, as " at file:line"; empty where it was not recorded."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    users = [f for f in frames if "/torch/" not in f[0]]
    return f" at {users[-1][0].rpartition('/')[2]}:{users[-1][1]}" if users else ""


def output_heads(
    capture: Capture, found: list[Use], vocabularies: Collection[int] | None = None
) -> set[fx.Node]:
    """Matmuls that project back onto the vocabulary of an embedding and feed no other matmul.

    Args:
        capture: The graphs.
        found: What they read.
        vocabularies: How many rows an embedding of tokens has; None for those of any embedding.
    """
    if vocabularies is None:
        tables = (use for use in found if _is_embedding(use))
        vocabularies = {capture.tensors[use.weight].shape[0] for use in tables}
    heads = set()
    for graph in capture.graphs:
        feeding = _feeding({use.node for use in found if use.x is not None and use.graph is graph})
        for use in found:
            if use.graph is graph and use.x is not None and use.node not in feeding:
                out = capture.tensors[use.weight].shape[0 if use.layout == "out_in" else 1]
                if out in vocabularies:
                    heads.add(use.node)
    return heads


def routers(found: list[Use]) -> set[fx.Node]:
    """Matmuls whose result picks experts: it reaches a top-k with no other matmul between."""
    matmuls = {use.node for use in found if use.x is not None}
    return {node for node in matmuls if _reaches_topk(node, matmuls)}


_NEAR = 8
"""How many ops there are at most between a router's matmul and its top-k."""


def _reaches_topk(start: fx.Node, matmuls: set[fx.Node]) -> bool:
    frontier = set(start.users)
    for _ in range(_NEAR):
        if any("topk" in str(node.target) for node in frontier):
            return True
        frontier = {user for node in frontier - matmuls for user in node.users}
    return False


def _feeding(matmuls: set[fx.Node]) -> set[fx.Node]:
    """All nodes that some matmul of the set reads, directly or through others."""
    return behind(source for node in matmuls for source in node.all_input_nodes)


def _is_embedding(use: Use) -> bool:
    if use.node.op == "call_module":
        return isinstance(use.graph.get_submodule(str(use.node.target)), nn.Embedding)
    return use.node.target in (
        torch.nn.functional.embedding,
        torch.embedding,
        torch.ops.aten.embedding.default,
    )
