"""GraphModule or ExportedProgram → what was inserted there: rotations are read off their nodes.

A graph that was saved, copied, traced from an adapted module or rewritten by a pass is read like
one that was just adapted: nothing but its nodes and their notes is asked.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from oftfx.errors import PlanError
from oftfx.host import Host
from oftfx.modules import CHILD, NOTE, site_name
from oftfx.nodes import behind
from oftfx.ops.factor import MAPS, SCALE, Factor
from oftfx.plan import Plan
from oftfx.spec import Spec


@dataclass(frozen=True, eq=False)
class Inserted:
    """One factor of a rotation, or of a matmul's outputs, as it stands in a graph.

    Attributes:
        node: The node that maps x.
        x: What it maps.
        factor: Its op, and the nodes and constants it takes besides x; of outputs, not the bias.
        parameters: Names of the parameters behind those.
        adapter: Name of its adapter.
        site: fqn of the site that holds the parameters.
    """

    node: fx.Node
    x: fx.Node
    factor: Factor
    parameters: tuple[str, ...]
    adapter: str
    site: str

    @property
    def operands(self) -> list[fx.Node]:
        """The nodes it takes besides x."""
        return [operand for operand in self.factor.operands if isinstance(operand, fx.Node)]

    def tensors(self, host: Host) -> dict[str, Tensor]:
        """The parameters behind it by name, as its method knows them."""
        return {name.rpartition(".")[2]: host.parameters()[name] for name in self.parameters}


def inserted(host: Host) -> list[Inserted]:
    """Every factor in a graph, read off its nodes alone, in order."""
    readers = host.readers()
    out = []
    for node in host.module.graph.nodes:
        if node.op == "call_function" and (node.target in MAPS or node.target is SCALE):
            x, *operands = node.args
            if node.target is SCALE:
                operands[1:] = [None]  # the bias is the matmul's
            nodes = [operand for operand in operands if isinstance(operand, fx.Node)]
            parameters = tuple(sorted(readers[n] for n in behind(nodes) if n in readers))
            owner, _, path = parameters[0].rpartition(".")[0].rpartition(f"{CHILD}.")
            adapter, _, weight = path.partition(".")
            site = site_name(owner.rstrip("."), weight or "weight")
            factor = Factor(node.target, tuple(operands))
            out.append(Inserted(node, x, factor, parameters, adapter, site))
    return out


def records(model: fx.GraphModule | ExportedProgram) -> dict[str, dict[str, Any]]:
    """What the graph remembers of its adapters, by name: their plan and the flags before."""
    out = {}
    for node in model.graph.nodes:
        if note := node.meta.get("custom", {}).get("oftfx"):
            record = json.loads(note)
            out[record["name"]] = record
    return out


def plans(host: Host) -> dict[str, Plan]:
    """The plans that a graph remembers, by adapter."""
    found = records(host.module).items()
    return {name: Plan.from_json(record["plan"]) for name, record in found}


def spec_of(found: Inserted, plans: dict[str, Plan]) -> Spec:
    """The spec a rotation was made from: the plan's, or what an exported module's nodes note.

    Raises:
        PlanError: The graph is a trace of an adapted module that notes nothing.
    """
    if found.adapter in plans:
        return plans[found.adapter].spec.at(found.site)
    note = found.node.meta.get("custom", {}).get(NOTE)
    if note is None:
        raise PlanError(
            f"{found.site}: the graph does not say how its rotation is made; ask the module it was "
            "traced from, or trace that with torch.export."
        )
    return Spec.from_json(json.loads(note))


def evaluate(host: Host, found: Inserted) -> Factor:
    """The factor with values for its nodes, which depend on parameters alone."""
    return Factor(found.factor.op, values_of(host, found.factor.operands, found.site))


@torch.no_grad()
def values_of(host: Host, nodes: Any, site: str) -> Any:
    """The values of nodes, or of a container of some, that depend on what the model holds alone.

    Raises:
        PlanError: They also depend on chance.
    """

    @functools.cache  # operands may be made from each other
    def value(source: fx.Node) -> Any:
        if (held := host.held(source)) is not None:
            return held
        args, kwargs = fx.node.map_arg((source.args, source.kwargs), value)
        if source.op == "call_method":
            return getattr(args[0], str(source.target))(*args[1:], **kwargs)
        assert callable(source.target)
        if torch.Tag.nondeterministic_seeded in getattr(source.target, "tags", ()):
            raise PlanError(
                f"{site}: the graph was traced in training mode and drops blocks at random; "
                "trace the model after model.eval()."
            )
        return source.target(*args, **kwargs)

    return fx.node.map_arg(nodes, value)
