"""Merging a graph: its rotations' nodes go, and the weights behind them are folded."""

from collections.abc import Callable
from itertools import takewhile

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from oftfx import insert, match
from oftfx.adapter import remove
from oftfx.capture import read
from oftfx.errors import MergeError
from oftfx.fold.report import MergedSite
from oftfx.fold.weight import Fold
from oftfx.host import Host, host_of
from oftfx.ops.factor import SCALE
from oftfx.sites.matmul import aten, is_view_of_weight, parameter_behind, tensor_behind


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
    behind = _scales(rotations)
    graph = read(host)
    uses = match.uses(graph)
    chains = [_chains(host, use, graph.aliases[use.weight], rotations) for use in uses]
    turning = {node for through_x, _ in chains for node in through_x}
    for node in turning:
        if others := _users(node) - {use.node for use in uses} - turning:
            raise MergeError(f"{rotations[node].site}: {others.pop()} reads what it rotates, too.")
    scaled = {scale for use in uses for scale in behind.get(use.node, ())}
    for node in rotations.keys() - turning - scaled - {n for _, chain in chains for n in chain}:
        raise MergeError(f"{rotations[node].site}: no weight was found behind its rotation.")

    folds: dict[str, Fold] = {}
    turned: dict[str, list[tuple[str, ...]]] = {}
    for use, (through_x, through_w) in zip(uses, chains, strict=True):
        name = use.weight
        through_y = [] if use.x is None else behind.get(use.node, [])  # not of its bias
        by = [rotations[node].parameters for node in (*through_x, *through_w, *through_y)]
        if turned.setdefault(name, by) != by:
            raise MergeError(f"{name} is read rotated in different ways; it cannot be folded.")
        if by and name not in folds:
            turning_w = [node for node in through_w if node.target is not SCALE]
            scales = [node for node in (*through_w, *through_y) if node.target is SCALE]
            factors = [insert.evaluate(host, rotations[node]) for node in through_x]
            factors += [insert.evaluate(host, rotations[node]).transposed() for node in turning_w]
            out_in = use.layout == "out_in"
            if turning_w:
                out_in = not parameter_behind(rotations[turning_w[0]].x)[1]
            fqn = name.removesuffix(".weight")
            weight = host.parameters()[name]
            of_outputs = [insert.evaluate(host, rotations[node]) for node in scales]
            folds[name] = Fold(fqn, weight, out_in, factors, weight.dtype, of_outputs)
    for fold in folds.values():
        fold.check()

    for use in uses:
        if not folds.keys().isdisjoint(graph.aliases[use.weight]):
            _read_own_name(host, use, graph.aliases[use.weight])
    costs = []
    for name, fold in folds.items():
        stored = fold.run()
        if report:
            costs.append(fold.cost(stored, untied=len(graph.aliases[name]) > 1))
        requires_grad = host.parameters()[name].requires_grad
        host.set(name, nn.Parameter(stored, requires_grad=requires_grad))
    return remove(host.finish()), costs


def _chains(
    host: Host, use: match.Use, aliases: tuple[str, ...], rotations: dict[fx.Node, insert.Inserted]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The rotations a matmul's input went through and those its weight did, as x meets them.

    The last rotation of a weight is the first of x.
    """
    readers = host.readers()
    reads = [n for n in use.node.all_input_nodes if readers.get(parameter_behind(n)[0]) in aliases]
    # An activation's path ends where it was another matmul's output.
    path = [] if use.x is None else takewhile(lambda node: node.target is not SCALE, _path(use.x))
    through_x = [node for node in path if node in rotations]
    through_w = [n for read in reads for n in _path(read) if n in rotations]
    return through_x[::-1], through_w


def _scales(rotations: dict[fx.Node, insert.Inserted]) -> dict[fx.Node, list[fx.Node]]:
    """The scales of outputs, by the matmul whose they are.

    Raises:
        MergeError: Something reads an output unscaled, too.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in rotations:
        if node.target is SCALE:
            found.setdefault(_product(node), []).append(node)
    for product, scales in found.items():
        if others := {user for user in _users(product) if _reads_values(user)} - set(scales):
            where = rotations[scales[0]].site
            raise MergeError(f"{where}: {others.pop()} reads its output unscaled, too.")
    return found


def _product(scale: fx.Node) -> fx.Node:
    """What is scaled, behind casts and other scales."""
    node = tensor_behind(scale.all_input_nodes[0])
    return _product(node) if node.target is SCALE else node


def _reads_values(node: fx.Node) -> bool:
    return node.target not in (aten.sym_size.int, aten._assert_tensor_metadata.default)


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
