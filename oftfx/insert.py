"""Plan → GraphModule or ExportedProgram: rotations become nodes.

    before                          after
    x, W, b                         x, W, b, theta
    y = linear(x, W, b)             core = oftfx.cayley(theta, b, k)
                                    x_r  = oftfx.rotate(x, core)
                                    y    = linear(x_r, W, b)

A second adapter's rotation goes between the first one's and the matmul, so that x·R1·R2.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from oftfx import match
from oftfx.capture import read
from oftfx.errors import PlanError
from oftfx.host import Host, call, host_of
from oftfx.match import Use
from oftfx.modules import CHILD, Rotation, parameter_path, site_name
from oftfx.plan import Plan, Site
from oftfx.regions import differentiable
from oftfx.rotations import oft
from oftfx.spec import OFT

ROTATE = torch.ops.oftfx.rotate.default
CAYLEY = torch.ops.oftfx.cayley.default


@dataclass(frozen=True, eq=False)
class Inserted:
    """One rotation as it stands in a graph.

    Attributes:
        node: The rotate node.
        x: What it rotates.
        core: The node of its residual blocks.
        parameter: Name of its parameter.
        adapter: Name of its adapter.
        site: fqn of the site that holds the parameter.
    """

    node: fx.Node
    x: fx.Node
    core: fx.Node
    parameter: str
    adapter: str
    site: str

    def spec(self, host: Host) -> OFT:
        """The spec this rotation was made from, read off its nodes."""
        cayleys: list[fx.Node] = []
        stack, seen = [self.core], set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.target is CAYLEY:
                cayleys.append(node)
            elif node.op == "call_function":
                stack.extend(node.all_input_nodes)
        orders = [node.args[2] for node in cayleys]
        block_size, order = cayleys[0].args[1], next((o for o in orders if o is not None), None)
        guard: Literal["rescale", "exact"] | None = None
        if len(orders) == 2:
            guard = "exact"
        elif cayleys[0].args[0] not in host.readers():
            guard = "rescale"
        return OFT(
            block_size=int(block_size),  # type: ignore[arg-type]
            order=4 if order is None else int(order),  # type: ignore[arg-type]
            exact=order is None,
            guard=guard,
            dtype=host.parameters()[self.parameter].dtype,
        )


def insert(
    model: fx.GraphModule | ExportedProgram, plan: Plan, name: str
) -> fx.GraphModule | ExportedProgram:
    """Adapts a graph and freezes its base: a GraphModule in place, a program as a new one.

    Raises:
        PlanError: The plan does not fit the graph, or an adapter of this name is there already.
            The graph is untouched then.
    """
    if name in records(model):
        raise PlanError(
            f"the graph has an adapter {name!r} already: remove it, or pass another name."
        )
    host = host_of(differentiable(model), edit=True)
    located = _locate(host, plan)

    trained = [n for n, p in host.parameters().items() if p.requires_grad]
    for record in records(model).values():  # the first adapter saw the base's own flags
        trained = record["trained"]
    ours = {rotation.parameter for rotation in inserted(host)}
    for weight, value in host.parameters().items():
        if weight not in ours:
            if isinstance(model, ExportedProgram):  # the given program keeps its own flags
                host.set(weight, nn.Parameter(value.detach(), requires_grad=False))
            else:
                value.requires_grad_(False)

    cores: dict[str, fx.Node] = {}
    rotated: dict[tuple[str, fx.Node], fx.Node] = {}
    first: fx.Node | None = None
    for site, found in located:
        if site.rotation not in cores:
            cores[site.rotation] = _add_core(host, plan, site, name)
        for use in found:
            assert use.x is not None
            graph = host.module.graph
            key = (site.rotation, use.x)
            if key not in rotated:
                with graph.inserting_before(use.node):
                    rotated[key] = call(graph, ROTATE, use.x, cores[site.rotation])
                rotated[key].meta["stack_trace"] = use.node.meta.get("stack_trace")
                first = first or rotated[key]
            use.feed(rotated[key])
    assert first is not None
    first.meta["custom"] = {
        **first.meta.get("custom", {}),
        "oftfx": json.dumps({"name": name, "plan": plan.to_json(), "trained": trained}),
    }
    return host.finish()


def remove(
    model: fx.GraphModule | ExportedProgram, name: str | None = None
) -> fx.GraphModule | ExportedProgram:
    """Takes an adapter's nodes and parameters out of a graph (all adapters for None).

    Raises:
        PlanError: There is no such adapter.
    """
    host = host_of(model, edit=True)
    found = inserted(host)
    has = {rotation.adapter for rotation in found}
    if not has or (name is not None and name not in has):
        raise PlanError(f"the graph has no adapter {name or ''!r}; it has {sorted(has) or 'none'}.")
    before = records(model)
    for rotation in found:
        if name in (None, rotation.adapter):
            bypass(rotation)
            erase(host, rotation)
    if before and (name is None or has == {name}):
        trained = set(next(iter(before.values()))["trained"])
        for weight, value in host.parameters().items():
            if isinstance(model, ExportedProgram):
                host.set(weight, nn.Parameter(value.detach(), requires_grad=weight in trained))
            else:
                value.requires_grad_(weight in trained)
    return host.finish()


def bypass(found: Inserted) -> None:
    """Gives the readers of a rotation what it rotates."""
    # Not `found.x`, which may be another adapter's rotation that is gone by now.
    x = found.node.args[0]
    assert isinstance(x, fx.Node)
    found.node.replace_all_uses_with(x)


def erase(host: Host, found: Inserted) -> None:
    """Erases a rotation that nothing uses any more, with its core and its parameter."""
    graph = host.module.graph
    readers = host.readers()
    graph.erase_node(found.node)
    behind, stack = set(), [found.core]
    while stack:
        node = stack.pop()
        if node not in behind:
            behind.add(node)
            stack.extend(node.all_input_nodes)
    for node in reversed(list(graph.nodes)):
        # A trace leaves nodes beside the core of which nothing comes, such as notes on casts.
        beside = node.op == "call_function" and not behind.isdisjoint(node.all_input_nodes)
        if node.users or not (node in behind or beside):
            continue
        if readers.get(node) == found.parameter:
            host.remove(node, found.parameter)
        elif node.op == "call_function":
            behind.update(node.all_input_nodes)
            graph.erase_node(node)


def inserted(host: Host) -> list[Inserted]:
    """Every rotation in a graph, read off its nodes alone, in order."""
    readers = host.readers()
    out = []
    for node in host.module.graph.nodes:
        if node.op == "call_function" and node.target is ROTATE:
            x, core = node.args
            start = core
            while start.op == "call_function":
                start = start.all_input_nodes[-1]
            parameter = readers[start]
            owner, _, path = parameter.rpartition(".theta")[0].rpartition(f"{CHILD}.")
            adapter, _, weight = path.partition(".")
            site = site_name(owner.rstrip("."), weight or "weight")
            out.append(Inserted(node, x, core, parameter, adapter, site))
    return out


def records(model: fx.GraphModule | ExportedProgram) -> dict[str, dict[str, Any]]:
    """What the graph remembers of its adapters, by name: their plan and the flags before."""
    out = {}
    for node in model.graph.nodes:
        if note := node.meta.get("custom", {}).get("oftfx"):
            record = json.loads(note)
            out[record["name"]] = record
    return out


def evaluate(host: Host, node: fx.Node) -> Tensor:
    """The value of a node that depends on parameters alone, such as a core."""
    readers = host.readers()

    @functools.cache  # a guard squares a matrix again and again
    def value(source: fx.Node) -> Any:
        if source in readers:
            return host.parameters()[readers[source]]
        args, kwargs = fx.node.map_arg((source.args, source.kwargs), value)
        if source.op == "call_method":
            return getattr(args[0], str(source.target))(*args[1:], **kwargs)
        assert callable(source.target)
        return source.target(*args, **kwargs)

    with torch.no_grad():
        return value(node)


def _locate(host: Host, plan: Plan) -> list[tuple[Site, list[Use]]]:
    """The uses of every planned site; nothing is changed before all are found."""
    by_weight: dict[str, list[Use]] = {}
    found = read(host)
    for use in match.uses(found):
        by_weight.setdefault(use.weight, []).append(use)
    located = []
    for site in plan.sites:
        fits = by_weight.get(site.weight, [])
        if not fits:
            raise PlanError(f"{site.weight}: no node of this graph reads it; plan the graph anew.")
        for use in fits:
            if use.x is None:
                raise PlanError(f"{site.weight} is read by {use.why_not}, which is no matmul x·W.")
            if use.graph is not host.module:
                raise PlanError(
                    f"{site.weight} is read inside a nested graph (a checkpointed or repeated "
                    "region): adapt the module before tracing it, or exclude the site."
                )
        shape = found.tensors[site.weight].shape
        if tuple(shape) != site.shape:
            raise PlanError(f"{site.weight} has shape {tuple(shape)}; the plan is another model's.")
        located.append((site, fits))
    return located


def _add_core(host: Host, plan: Plan, site: Site, name: str) -> fx.Node:
    """Adds a site's parameter and the nodes that make its core from it."""
    spec = plan.spec_of(site)
    device = host.parameters()[site.weight].device
    rotation = Rotation(spec, site.in_features, device, plan.seed_of(site))
    functional = site.kind == "functional"
    theta = host.add(f"{parameter_path(site.weight, name, functional)}.theta", rotation.theta)
    graph = host.module.graph
    traced = _traced_core(spec, site.in_features, device)
    values: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(_first_call(graph)):
        for node in traced.nodes:
            if node.op == "placeholder":
                values[node] = theta
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = call(graph, node.target, *args, **kwargs)
    (result,) = traced.find_nodes(op="output")[0].args
    return values[result]


@functools.cache
def _traced_core(spec: OFT, width: int, device: torch.device) -> fx.Graph:
    """`rotations.oft.core` as a graph: one cayley node, and a few more where a guard is on."""
    theta = torch.zeros(oft.shape(spec, width), dtype=spec.dtype, device=device)
    graph = make_fx(lambda theta: oft.core(theta, spec))(theta).graph
    graph.eliminate_dead_code()
    return graph


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
