"""What will be adapted, as pure data: printable, JSON, hashable.

records.py      a plan and its parts
candidates.py   the weights of a graph or a module tree that could be sites
choose.py       which of them a spec wants
"""

from typing import Any, Literal

from torch import nn

from oftfx.capture import Model, unwrap
from oftfx.errors import PlanError, SpecError
from oftfx.plan.candidates import of_graph, of_modules
from oftfx.plan.choose import choose, copied
from oftfx.plan.records import Copied, Group, Plan, Site, Skip
from oftfx.spec import Spec

__all__ = ["Copied", "Group", "Plan", "Site", "Skip", "plan"]


def plan(
    model: Model,
    spec: Spec,
    example_inputs: Any = None,
    capture: Literal["graph", "modules"] = "graph",
) -> Plan:
    """Decides what a spec adapts in a model, without touching it.

    Args:
        model: An nn.Module (its weights may be on `meta`), GraphModule or ExportedProgram.
        spec: What to adapt and how.
        example_inputs: For tracing an nn.Module: a tensor, a tuple of positional or a dict of
            keyword arguments. Not needed for transformers models.
        capture: "graph" traces the model; "modules" walks its module tree, for models that cannot
            be traced.

    Raises:
        CaptureError: The model cannot be traced.
        PlanError: A target matches nothing, or a matched site cannot be adapted.
        SpecError: ``spec`` is no spec.
        ValueError: ``capture`` is neither.
    """
    model = unwrap(model)
    if not isinstance(spec, Spec):
        raise SpecError(
            f"spec is a {type(spec).__name__}: it must be a spec such as oftfx.OFT(block_size=32)."
        )
    if capture not in ("graph", "modules"):
        raise ValueError(f"capture={capture!r}: must be 'graph' or 'modules'.")
    if capture == "modules":
        if not isinstance(model, nn.Module):
            raise PlanError('capture="modules" walks a module tree; an ExportedProgram has none.')
        return choose(of_modules(model, spec), spec, copied(model, spec), "modules")
    return choose(of_graph(model, example_inputs), spec, copied(model, spec), "graph")
