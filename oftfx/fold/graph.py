"""Merging a graph: its rotations' nodes go, and the weights behind them are folded."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from oftfx import match
from oftfx.adapter import remove
from oftfx.capture import read
from oftfx.errors import MergeError, PlanError
from oftfx.fold import packed
from oftfx.fold.cost import Cost, cost, settled
from oftfx.fold.options import Options
from oftfx.fold.report import MergedSite, warn_of_loss
from oftfx.fold.weight import Fold, check_finite
from oftfx.host import Host, host_of
from oftfx.inserted import Inserted, evaluate, inserted
from oftfx.match import Use
from oftfx.nodes import CAST_NOTE
from oftfx.ops.factor import SCALE, Factor
from oftfx.progress import tracked
from oftfx.regions import differentiable
from oftfx.sites.matmul import (
    aten,
    is_view_of_weight,
    parameter_behind,
    tensor_behind,
)


@dataclass(frozen=True)
class _Site:
    """A weight to fold, and what reads it; its floats are made when they are wanted."""

    name: str
    uses: list[Use]
    factors: list[Factor]
    scales: list[Factor]
    out_in: bool = True

    @property
    def packed(self) -> bool:
        """Whether it is quantised."""
        return packed.operands(self.uses[0].node) is not None

    def fold(self, host: Host, dtype: torch.dtype = torch.bfloat16) -> Fold:
        """Its fold; ``dtype`` is for a quantised weight, a float one keeps its own."""
        fqn = self.name.removesuffix(".weight")
        if self.packed:
            weight = packed.floats(host, self.uses[0].node, fqn)
            return Fold(fqn, weight, True, self.factors, dtype, self.scales)
        kept = host.parameters()[self.name]
        return Fold(fqn, kept, self.out_in, self.factors, kept.dtype, self.scales)


@torch.no_grad()
def merge_graph(
    model: fx.GraphModule | ExportedProgram, report: bool, options: Options
) -> tuple[fx.GraphModule | ExportedProgram, list[MergedSite]]:
    """Folds every rotation of a graph into the weights behind it, and takes its nodes out.

    Raises:
        MergeError: A weight is read rotated in different ways, or nothing was found behind a
            rotation, or a weight cannot be folded. The graph is untouched.
    """
    host = host_of(_opened(model), edit=True)
    graph = read(host)
    uses = match.uses(graph)
    sites = _sites(host, uses, graph.aliases)
    weights = (use for use in uses if use.x is not None)  # not biases
    quantised = _by_weight(use for use in weights if packed.operands(use.node) is not None)
    options.check(bool(quantised))
    if options.to_floats(any(site.packed for site in sites)):
        rotated = {site.name for site in sites}
        sites += [_Site(n, uses, [], []) for n, uses in quantised.items() if n not in rotated]
    turned = []
    for site in sites:
        turned.append(_checked(host, site))
        if site.packed and options.requantize:
            packed.check_readers(host, site.uses[0].node, site.name)
    check_finite(turned)

    for use in uses:
        if any(site.name in graph.aliases[use.weight] for site in sites if not site.packed):
            _read_own_name(host, use, graph.aliases[use.weight])
    measured = []
    for site in tracked(sites, "folding"):
        untied = len(graph.aliases[site.name]) > 1
        each = _store(host, site, report, options, untied)
        if each is not None and site.factors:
            measured.append(each)
    costs = settled(measured)
    if options.requantize:
        warn_of_loss(costs)
    return remove(host.finish()), costs


def _checked(host: Host, site: _Site) -> tuple[str, list[Tensor]]:
    """What a site's factors are made of; the floats of a quantised weight are gone then."""
    fold = site.fold(host)
    fold.check()
    return fold.fqn, fold.tensors()


def _opened(model: fx.GraphModule | ExportedProgram) -> fx.GraphModule | ExportedProgram:
    """The graph with its quantised matmuls in sight."""
    try:
        return differentiable(model)
    except PlanError as error:
        raise MergeError(str(error)) from error


def _by_weight(uses: Iterable[Use]) -> dict[str, list[Use]]:
    found: dict[str, list[Use]] = {}
    for use in uses:
        found.setdefault(use.weight, []).append(use)
    return found


class _Chain(NamedTuple):
    """The rotations of one matmul, as x meets them: of its input, of its weight, of its output."""

    x: list[fx.Node]
    w: list[fx.Node]
    y: list[fx.Node]


def _sites(host: Host, uses: list[Use], aliases: dict[str, tuple[str, ...]]) -> list[_Site]:
    """The weights to fold, by the rotations between them and their inputs and outputs."""
    rotations = {found.node: found for found in inserted(host)}
    behind = _scales(rotations)
    chains = {use: _chain(host, use, aliases[use.weight], rotations, behind) for use in uses}
    turning = {node for chain in chains.values() for node in chain.x}
    for node in turning:
        if others := _users(node) - {use.node for use in uses} - turning:
            raise MergeError(f"{rotations[node].site}: {others.pop()} reads what it rotates, too.")
    for node in rotations.keys() - {n for chain in chains.values() for part in chain for n in part}:
        raise MergeError(
            f"{rotations[node].site}: no weight was found behind its rotation. In a graph, floats "
            "and bitsandbytes' weights are folded: merge the module, and export that."
        )
    sites = []
    for name, reads in _by_weight(uses).items():
        ways = [chains[use] for use in reads]
        turns = [[rotations[node].parameters for part in way for node in part] for way in ways]
        if any(by != turns[0] for by in turns):
            raise MergeError(f"{name} is read rotated in different ways; it cannot be folded.")
        if turns[0]:
            sites.append(_site(host, name, reads, ways[0], rotations))
    return sites


def _site(
    host: Host,
    name: str,
    reads: list[Use],
    chain: _Chain,
    rotations: dict[fx.Node, Inserted],
) -> _Site:
    def factors(nodes: Iterable[fx.Node]) -> list[Factor]:
        return [evaluate(host, rotations[node]) for node in nodes]

    turning = [node for node in chain.w if node.target is not SCALE]
    scaling = [node for node in (*chain.w, *chain.y) if node.target is SCALE]
    out_in = reads[0].layout == "out_in"
    if turning:
        out_in = not parameter_behind(rotations[turning[0]].x)[1]
    turned = factors(chain.x) + [factor.transposed() for factor in factors(turning)]
    return _Site(name, reads, turned, factors(scaling), out_in)


def _store(host: Host, site: _Site, report: bool, options: Options, untied: bool) -> Cost | None:
    """Folds one weight; the floats of a quantised one are gone when this returns."""
    fold = site.fold(host, options.floats)
    if not site.packed:
        stored = fold.run()
        requires_grad = fold.weight.requires_grad
        host.set(site.name, nn.Parameter(stored, requires_grad=requires_grad))
        return cost(fold, stored, untied) if report else None
    nodes = [use.node for use in site.uses]
    if options.requantize:
        stored = packed.repack(host, nodes, fold.folded(torch.float32), fold.fqn)
        return cost(fold, stored, requantised=True)
    stored = fold.run()
    packed.unpack(host, nodes, stored)
    return cost(fold, stored) if report and site.factors else None


def _chain(
    host: Host,
    use: Use,
    aliases: tuple[str, ...],
    rotations: dict[fx.Node, Inserted],
    behind: dict[fx.Node, list[fx.Node]],
) -> _Chain:
    """The rotations of a matmul. The last one of a weight is the first of x."""
    readers = host.readers()
    reads = [n for n in use.node.all_input_nodes if readers.get(parameter_behind(n)[0]) in aliases]
    through_w = [n for read in reads for n in _path(read) if n in rotations]
    if use.x is None:  # a bias
        return _Chain([], through_w, [])
    # An activation's path ends where it was another matmul's output.
    path = takewhile(lambda node: node.target is not SCALE, _path(use.x))
    through_x = [node for node in path if node in rotations]
    return _Chain(through_x[::-1], through_w, behind.get(use.node, []))


def _scales(rotations: dict[fx.Node, Inserted]) -> dict[fx.Node, list[fx.Node]]:
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
    return node.target not in (aten.sym_size.int, CAST_NOTE)


def _path(node: fx.Node) -> list[fx.Node]:
    """The casts, views and rotations between a node and where it comes from, and the latter."""
    path = [node]
    while is_view_of_weight(path[-1]) or tensor_behind(path[-1]) is not path[-1]:
        path.append(path[-1].all_input_nodes[0])
    return path


def _users(node: fx.Node) -> set[fx.Node]:
    """What reads a node, directly or through casts and views, besides export's notes on casts."""
    users = set()
    for user in (user for user in node.users if user.target is not CAST_NOTE):
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
