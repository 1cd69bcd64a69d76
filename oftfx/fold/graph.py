"""Merging a graph: its rotations' nodes go, and the weights behind them are folded."""

from collections.abc import Callable

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from oftfx import insert, match
from oftfx.adapter import remove
from oftfx.capture import read
from oftfx.errors import MergeError
from oftfx.fold.cost import cost, settled
from oftfx.fold.report import MergedSite
from oftfx.fold.weight import Fold, check_finite
from oftfx.host import Host, host_of
from oftfx.sites.matmul import is_view_of_weight, parameter_behind, tensor_behind


@torch.no_grad()
def merge_graph(
    model: fx.GraphModule | ExportedProgram, report: bool
) -> tuple[fx.GraphModule | ExportedProgram, list[MergedSite]]:
    """Folds every rotation of a graph into the weights behind it, and takes its nodes out.

    Raises:
        MergeError: A weight is read rotated in different ways, or nothing was found behind a
            rotation, or a weight cannot be folded. The graph is untouched.
    """
    host = host_of(model, edit=True)
    rotations = {found.node: found for found in insert.inserted(host)}
    graph = read(host)
    uses = match.uses(graph)
    chains = [_chains(host, use, graph.aliases[use.weight], rotations) for use in uses]
    turning = {node for through_x, _ in chains for node in through_x}
    for node in turning:
        if others := _users(node) - {use.node for use in uses} - turning:
            raise MergeError(f"{rotations[node].site}: {others.pop()} reads what it rotates, too.")
    for node in rotations.keys() - turning - {n for _, through_w in chains for n in through_w}:
        raise MergeError(f"{rotations[node].site}: no weight was found behind its rotation.")

    folds: dict[str, Fold] = {}
    turned: dict[str, list[tuple[str, ...]]] = {}
    for use, (through_x, through_w) in zip(uses, chains, strict=True):
        name = use.weight
        by = [rotations[node].parameters for node in (*through_x, *through_w)]
        if turned.setdefault(name, by) != by:
            raise MergeError(f"{name} is read rotated in different ways; it cannot be folded.")
        if by and name not in folds:
            factors = [insert.evaluate(host, rotations[node]) for node in through_x]
            factors += [insert.evaluate(host, rotations[node]).transposed() for node in through_w]
            out_in = use.layout == "out_in"
            if through_w:
                out_in = not parameter_behind(rotations[through_w[0]].x)[1]
            fqn = name.removesuffix(".weight")
            weight = host.parameters()[name]
            folds[name] = Fold(fqn, weight, out_in, factors, weight.dtype)
    for fold in folds.values():
        fold.check()
    check_finite((fold.fqn, fold.finite()) for fold in folds.values())

    for use in uses:
        if not folds.keys().isdisjoint(graph.aliases[use.weight]):
            _read_own_name(host, use, graph.aliases[use.weight])
    measured = []
    for name, fold in folds.items():
        stored = fold.run()
        if report:
            measured.append(cost(fold, stored, untied=len(graph.aliases[name]) > 1))
        requires_grad = host.parameters()[name].requires_grad
        host.set(name, nn.Parameter(stored, requires_grad=requires_grad))
    return remove(host.finish()), settled(measured)


def _chains(
    host: Host, use: match.Use, aliases: tuple[str, ...], rotations: dict[fx.Node, insert.Inserted]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The rotations a matmul's input went through and those its weight did, as x meets them.

    The last rotation of a weight is the first of x.
    """
    readers = host.readers()
    reads = [n for n in use.node.all_input_nodes if readers.get(parameter_behind(n)[0]) in aliases]
    through_x = [] if use.x is None else [n for n in _path(use.x) if n in rotations]
    through_w = [n for read in reads for n in _path(read) if n in rotations]
    return through_x[::-1], through_w


def _path(node: fx.Node) -> list[fx.Node]:
    """The casts, views and rotations between a node and where it comes from, and the latter."""
    path = [node]
    while is_view_of_weight(path[-1]) or tensor_behind(path[-1]) is not path[-1]:
        path.append(path[-1].all_input_nodes[0])
    return path


def _users(node: fx.Node) -> set[fx.Node]:
    """What reads a node, directly or through casts and views."""
    users = set()
    for user in node.users:
        users |= _users(user) if tensor_behind(user) is not user else {user}
    return users


def _read_own_name(host: Host, use: match.Use, aliases: tuple[str, ...]) -> None:
    """Lets a node read a tied weight under its owner's name; tracers use one name for all."""
    readers, graph = host.readers(), host.module.graph
    for given in use.node.all_input_nodes:
        *path, start = _path(given)
        if use.weight == readers.get(start, use.weight) or readers[start] not in aliases:
            continue
        own = next((node for node, name in readers.items() if name == use.weight), None)
        if own is None:  # nothing read it by this name so far
            own = host.add(use.weight, host.parameters()[use.weight])
        moved = {start: own}
        for node in reversed(path):
            with graph.inserting_before(use.node):
                moved[node] = graph.node_copy(node, _looked_up(moved))
        use.node.replace_input_with(given, moved[given])


def _looked_up(moved: dict[fx.Node, fx.Node]) -> Callable[[fx.Node], fx.Node]:
    return lambda node: moved.get(node, node)
