"""Plan → GraphModule or ExportedProgram: rotations become nodes.

    before                          after
    x, W, b                         x, W, b, theta
    y = linear(x, W, b)             core = oftfx.cayley(theta, b, k)
                                    x_r  = oftfx.rotate(x, core)
                                    y    = linear(x_r, W, b)
                                    y_s  = oftfx.scale(y, magnitude, b)     where asked for

A second adapter's rotation goes between the first one's and the matmul, so that x·R1·R2.
"""

import functools
import json
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from oftfx import match
from oftfx.capture import read
from oftfx.errors import OftfxWarning, PlanError, no_adapter
from oftfx.fixed import Fixed, Values
from oftfx.host import Host, call, host_of
from oftfx.inserted import Inserted, inserted, records
from oftfx.match import Use
from oftfx.modules import Rotation, parameter_path
from oftfx.nodes import behind
from oftfx.ops.factor import SCALE, Factor
from oftfx.outputs import Outputs
from oftfx.plan import Plan, Site
from oftfx.regions import differentiable
from oftfx.rotations import method_of, output_shapes
from oftfx.sites import matmul
from oftfx.spec import Spec


def insert(
    model: fx.GraphModule | ExportedProgram, plan: Plan, name: str, fixed: Fixed
) -> fx.GraphModule | ExportedProgram:
    """Adapts a graph and freezes its base: a GraphModule in place, a program as a new one.

    Args:
        model: The graph.
        plan: What to adapt.
        name: Of the adapter.
        fixed: Called once the plan is known to fit, before anything is changed.

    Raises:
        PlanError: The plan does not fit the graph, or an adapter of this name is there already.
            The graph is untouched then.
    """
    from oftfx.passes.effects import epochs  # the passes bring the compiler, `import oftfx` may not

    if name in records(model):
        raise PlanError(
            f"the graph has an adapter {name!r} already: remove it, or pass another name."
        )
    host = host_of(differentiable(model), edit=True)
    located = locate(host, plan)
    if any(getattr(plan.spec_of(site), "dropout", 0) for site, _ in located):
        warnings.warn(
            "dropout has no effect in a graph, which knows no training mode: adapt the nn.Module "
            "and train that, or use dropout=0.",
            OftfxWarning,
            stacklevel=2,
        )
    values = fixed()

    trained = [n for n, p in host.parameters().items() if p.requires_grad]
    for record in records(model).values():  # the first adapter saw the base's own flags
        trained = record["trained"]
    ours = {parameter for found in inserted(host) for parameter in found.parameters}
    for weight, value in host.parameters().items():
        if weight not in ours:
            if isinstance(model, ExportedProgram):  # the given program keeps its own flags
                host.set(weight, nn.Parameter(value.detach(), requires_grad=False))
            else:
                value.requires_grad_(False)

    factors: dict[str, tuple[Factor, ...]] = {}
    rotated: dict[tuple[str, fx.Node, int], fx.Node] = {}
    epoch = epochs(host.module.graph)  # of two of them, x may be two tensors
    first: fx.Node | None = None
    for site, found in located:
        if site.rotation not in factors:
            factors[site.rotation] = _add_factors(host, plan, site, name, values)
        for use in found:
            assert use.x is not None
            graph = host.module.graph
            key = (site.rotation, use.x, epoch[use.node])
            if key not in rotated:
                x = use.x
                with graph.inserting_before(use.node):
                    for factor in factors[site.rotation]:
                        x = call(graph, factor.op, x, *factor.operands)
                        _place(x, use.node)
                        first = first or x
                rotated[key] = x
            use.feed(rotated[key])
    for site, found in located:  # once all are fed: what is scaled here may be another's x
        for magnitude in _add_outputs(host, plan, site, name):
            for use in found:
                _scale(host, use.node, magnitude)
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
        raise no_adapter("the graph", name, has)
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
    """Erases a factor that nothing uses any more, and what of its operands only it used."""
    graph = host.module.graph
    others = set(found.node.all_input_nodes) - {found.x, *found.operands}
    graph.erase_node(found.node)
    for node in others:  # a bias that was read for a scale alone
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    erase_operands(host, found)


def erase_operands(host: Host, found: Inserted) -> None:
    """Erases what of a factor's operands nothing uses any more, and their parameters."""
    graph, readers = host.module.graph, host.readers()
    makers = behind(found.operands)
    for node in reversed(list(graph.nodes)):
        # A trace leaves nodes beside the core of which nothing comes, such as notes on casts.
        beside = node.op == "call_function" and not makers.isdisjoint(node.all_input_nodes)
        if node.users or not (node in makers or beside):
            continue
        if readers.get(node) in found.parameters:
            host.remove(node, readers[node])
        elif node.op == "call_function":
            makers.update(node.all_input_nodes)
            graph.erase_node(node)


def locate(host: Host, plan: Plan) -> list[tuple[Site, list[Use]]]:
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
            if use.node.kwargs.get("beta", 1) != 1 and output_shapes(plan.spec_of(site), 1):
                raise PlanError(
                    f"{site.weight}: its matmul adds a multiple of another tensor, beta="
                    f"{use.node.kwargs['beta']}, beside which its outputs cannot be scaled: "
                    "exclude the site, or leave magnitude out."
                )
        shape = found.tensors[site.weight].shape
        if tuple(shape) != site.shape:
            raise PlanError(f"{site.weight} has shape {tuple(shape)}; the plan is another model's.")
        located.append((site, fits))
    return located


def _add_factors(
    host: Host, plan: Plan, site: Site, name: str, fixed: Values
) -> tuple[Factor, ...]:
    """Adds a site's parameters and the nodes that make the operands of its factors from them."""
    spec = plan.spec_of(site)
    device = host.parameters()[site.weight].device
    seed = plan.seed_of(site.rotation)
    rotation = Rotation(spec, site.in_features, device, seed, site.out_features)
    rotation.fill(fixed.get(site.fqn, {}))
    path = parameter_path(site.weight, name, site.kind == "functional")
    added = [host.add(f"{path}.{leaf}", rotation.get_parameter(leaf)) for leaf in rotation.shapes]
    graph = host.module.graph
    traced = _traced_cores(spec, site.in_features, device)
    values = dict(zip(traced.find_nodes(op="placeholder"), added, strict=True))
    first = _first_call(graph)
    with graph.inserting_before(first):
        for node in (node for node in traced.nodes if node.op == "call_function"):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = call(graph, node.target, *args, **kwargs)
            if "nn_module_stack" in first.meta:  # at the beginning only the whole model runs
                root, *_ = first.meta["nn_module_stack"].items()
                values[node].meta["nn_module_stack"] = dict([root])
    (cores,) = traced.find_nodes(op="output")[0].args
    return method_of(spec).factors([values[core] for core in cores], spec)


def _add_outputs(host: Host, plan: Plan, site: Site, name: str) -> Iterator[fx.Node]:
    """Adds what a site trains behind its matmuls."""
    device = host.parameters()[site.weight].device
    seed = plan.seed_of(site.fqn)
    outputs = Outputs(plan.spec_of(site), site.out_features, device, seed)
    path = parameter_path(site.weight, name, site.kind == "functional")
    for leaf, value in outputs.named_parameters():
        yield host.add(f"{path}.{leaf}", value)


def _scale(host: Host, y: fx.Node, magnitude: fx.Node) -> None:
    """Lets all that reads a matmul read it scaled, its bias left out."""
    graph, users = host.module.graph, list(y.users)
    with graph.inserting_before(y.next):
        scaled = call(graph, SCALE, y, magnitude, _bias(host, y))
        _place(scaled, y)
    for user in users:
        user.replace_input_with(y, scaled)


def _place(node: fx.Node, beside: fx.Node) -> None:
    """Says of a node that the code which made another one made it, where a tracer noted that."""
    for note in ("stack_trace", "nn_module_stack"):
        if note in beside.meta:
            node.meta[note] = beside.meta[note]


def _bias(host: Host, node: fx.Node) -> fx.Node | None:
    """What a matmul adds to its product."""
    if (spelled := matmul.spelling(node)) is not None:
        return spelled.bias.of(node) if spelled.bias else None
    owner = str(node.target)  # call_module
    if getattr(host.module.get_submodule(owner), "bias", None) is None:
        return None
    return host.module.graph.get_attr(f"{owner}.bias")


@functools.cache
def _traced_cores(spec: Spec, width: int, device: torch.device) -> fx.Graph:
    """A method's `cores` as a graph: for OFT one cayley node, and a few more with a guard on."""
    method = method_of(spec)
    shapes = method.shapes(spec, width)

    def cores(*tensors: Tensor) -> tuple[Tensor, ...]:
        return method.cores(dict(zip(shapes, tensors, strict=True)), spec)

    zeros = [torch.zeros(shape, dtype=spec.dtype, device=device) for shape in shapes.values()]
    graph = make_fx(cores)(*zeros).graph
    graph.eliminate_dead_code()
    return graph


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
