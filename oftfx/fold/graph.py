"""Merging a graph: its rotations' nodes go, and the weights behind them are folded."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from oftfx import insert, match
from oftfx.adapter import remove
from oftfx.capture import read
from oftfx.errors import MergeError, PlanError
from oftfx.fold import packed
from oftfx.fold.cost import Cost, cost, settled
from oftfx.fold.options import Options
from oftfx.fold.report import MergedSite, warn_of_loss
from oftfx.fold.weight import Fold, check_finite
from oftfx.host import Host, host_of
from oftfx.match import Use
from oftfx.ops.factor import Factor
from oftfx.regions import differentiable
from oftfx.sites.matmul import (
    is_view_of_weight,
    parameter_behind,
    quantised_shape,
    tensor_behind,
)


@dataclass(frozen=True)
class _Site:
    """A weight to fold, and what reads it; its floats are made when they are wanted."""

    name: str
    uses: list[Use]
    factors: list[Factor]
    out_in: bool = True

    @property
    def packed(self) -> bool:
        """Whether it is quantised."""
        return quantised_shape(self.uses[0].node) is not None

    def fold(self, host: Host, dtype: torch.dtype = torch.bfloat16) -> Fold:
        """Its fold; ``dtype`` is for a quantised weight, a float one keeps its own."""
        fqn = self.name.removesuffix(".weight")
        if self.packed:
            weight = packed.floats(host, self.uses[0].node, fqn)
            return Fold(fqn, weight, True, self.factors, dtype)
        kept = host.parameters()[self.name]
        return Fold(fqn, kept, self.out_in, self.factors, kept.dtype)


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
    quantised = _by_weight(use for use in weights if quantised_shape(use.node) is not None)
    options.check(bool(quantised))
    if options.to_floats(any(site.packed for site in sites)):
        rotated = {site.name for site in sites}
        sites += [_Site(n, uses, []) for n, uses in quantised.items() if n not in rotated]
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
    for site in sites:
        untied = len(graph.aliases[site.name]) > 1
        each = _store(host, site, report, options, untied)
        if each is not None and site.factors:
            measured.append(each)
    costs = settled(measured)
    if options.requantize:
        warn_of_loss(costs)
    return remove(host.finish()), costs


def _checked(host: Host, site: _Site) -> tuple[str, Tensor]:
    """The largest number of a site's rotation; the floats of a quantised weight are gone then."""
    fold = site.fold(host)
    fold.check()
    return fold.fqn, fold.largest()


def _opened(model: fx.GraphModule | ExportedProgram) -> fx.GraphModule | ExportedProgram:
    """The graph with its 4-bit matmuls in sight."""
    try:
        return differentiable(model)
    except PlanError as error:
        raise MergeError(str(error)) from error


def _by_weight(uses: Iterable[Use]) -> dict[str, list[Use]]:
    found: dict[str, list[Use]] = {}
    for use in uses:
        found.setdefault(use.weight, []).append(use)
    return found


def _sites(host: Host, uses: list[Use], aliases: dict[str, tuple[str, ...]]) -> list[_Site]:
    """The weights to fold, by the rotations between them and their inputs."""
    rotations = {found.node: found for found in insert.inserted(host)}
    chains = {use: _chains(host, use, aliases[use.weight], rotations) for use in uses}
    turning = {node for through_x, _ in chains.values() for node in through_x}
    for node in turning:
        if others := _users(node) - {use.node for use in uses} - turning:
            raise MergeError(f"{rotations[node].site}: {others.pop()} reads what it rotates, too.")
    on_weights = {node for _, through_w in chains.values() for node in through_w}
    for node in rotations.keys() - turning - on_weights:
        raise MergeError(
            f"{rotations[node].site}: no weight was found behind its rotation. In a graph, floats "
            "and 4-bit weights are folded: merge the module, and export that."
        )
    sites = []
    for name, reads in _by_weight(uses).items():
        ways = [chains[use] for use in reads]
        turns = [[rotations[node].parameters for node in (*x, *w)] for x, w in ways]
        if any(by != turns[0] for by in turns):
            raise MergeError(f"{name} is read rotated in different ways; it cannot be folded.")
        if turns[0]:
            through_x, through_w = ways[0]
            factors = [insert.evaluate(host, rotations[node]) for node in through_x]
            factors += [insert.evaluate(host, rotations[node]).transposed() for node in through_w]
            out_in = reads[0].layout == "out_in"
            if through_w:
                out_in = not parameter_behind(rotations[through_w[0]].x)[1]
            sites.append(_Site(name, reads, factors, out_in))
    return sites


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
    """What reads a node, directly or through casts and views, besides export's notes on casts."""
    users = set()
    notes = torch.ops.aten._assert_tensor_metadata.default
    for user in (user for user in node.users if user.target is not notes):
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
