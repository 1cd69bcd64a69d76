"""How each site of an adapted model is run, how far it has turned, and what compiling did to it.

explanation.py   the result, and its table
grid.py          names of sites → layers and places in them
layer.py         the captured graph of one layer, in boxes
layout.py        where the boxes go          svg.py   their picture
page.py          all of it as one page of HTML, in the frame of page.html
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import ExportedProgram

from oftfx import inserted
from oftfx.attach import records_of
from oftfx.capture import Model, unwrap
from oftfx.errors import CaptureError, PlanError
from oftfx.explain.explanation import ExplainedSite, Explanation
from oftfx.explain.grid import grid
from oftfx.explain.layer import LayerGraph, layer_graph
from oftfx.health import Held, health, rotations_of
from oftfx.host import host_of, parameters_of
from oftfx.modules import Adapted, built, in_use, is_rotation
from oftfx.modules.fused import foldable
from oftfx.ops.cost import fold_from
from oftfx.plan import Plan, Site
from oftfx.progress import tracked
from oftfx.rotations import method_of, oft
from oftfx.sites import linear
from oftfx.spec import Spec

__all__ = ["ExplainedSite", "Explanation", "explain"]

PROBES = 16
"""How many random inputs a mean angle is taken of."""


def explain(
    model: Model,
    name: str | None = None,
    layer: str | None = None,
    example_inputs: Any = None,
) -> Explanation:
    """How each site of an adapted model is run, and how far it has turned.

    Args:
        model: An adapted nn.Module, GraphModule or ExportedProgram.
        name: One adapter, in use or not; None for those in use.
        layer: A part of the model whose graph to capture as well, for the picture in
            [`save_html`][oftfx.Explanation.save_html]: a module's name, or "auto" for the first of
            the layers with the most sites. None captures nothing, which takes no time.
        example_inputs: To trace a ``layer`` with, as for [`plan`][oftfx.plan].

    Raises:
        PlanError: The model has no adapter (or none of this name, or none in use), or is a trace
            that remembers no plan.
    """
    inner = unwrap(model)
    plans = _plans(inner)
    shown = list(plans) if name is None else [name]
    if name is None and not isinstance(inner, (fx.GraphModule, ExportedProgram)):
        shown = in_use(inner)
    sites = [
        site
        for adapter, plan in plans.items()
        if adapter in shown
        for site in _explained(inner, adapter, plan)
    ]
    if not sites:
        rotations_of(inner, name)  # says what is missing, unless only the plan is
        raise PlanError("the model does not say how it was adapted: explain what it was made from.")
    compiled = _compiled(inner, whole=inner is not model)
    return Explanation(
        tuple(sites),
        compiled,
        _counts() if compiled else {},
        model=type(inner).__name__,
        base_bytes=_base_bytes(inner),
        graph=None if layer is None else _graph(inner, layer, sites, example_inputs),
    )


def _plans(model: nn.Module | ExportedProgram) -> dict[str, Plan]:
    if isinstance(model, (fx.GraphModule, ExportedProgram)):
        return inserted.plans(host_of(model))
    return {name: record.plan for name, record in records_of(model).items()}


def _explained(
    model: nn.Module | ExportedProgram, adapter: str, plan: Plan
) -> Iterator[ExplainedSite]:
    held = {rotation.site: rotation for rotation in rotations_of(model, adapter)}
    known = health(model, adapter)
    widths = {site.fqn: site.in_features for site in plan.sites}
    means = [_mean_angle(held[fqn], widths[fqn]) for fqn in tracked(known.fqns, "measuring angles")]
    values = (means, known.norm.tolist(), known.orthogonality_error.tolist())
    turned = dict(zip(known.fqns, zip(*values, strict=True), strict=True))
    diverged = dict(zip(known.fqns, known.diverged.tolist(), strict=True))
    readers: dict[int, set[str]] = {}
    for site in plan.sites:
        readers.setdefault(site.group, set()).add(site.rotation)
    for site in plan.sites:
        spec = held[site.rotation].spec
        yield ExplainedSite(
            site.fqn,
            adapter,
            site.kind,
            site.in_features,
            site.out_features,
            _method(spec),
            _lowering(site, spec, len(readers[site.group])),
            *turned[site.rotation],
            site.num_trainable,
            0 if site.shared else _bytes(held[site.fqn]),
            diverged[site.rotation],
            _fold_from(model, adapter, site),
        )


@torch.no_grad()
def _mean_angle(held: Held, width: int) -> float:
    """By how many radians a rotation turns an input, on average over random ones of a fixed seed.

    Of unit vectors u and v the angle is 2·arcsin(‖u − v‖/2), exact to the last digit near 0.
    """
    factors = method_of(held.spec).factors(built(held.spec, held.tensors, held.scale), held.spec)
    first = next(iter(held.tensors.values()))
    wide = torch.promote_types(first.dtype, torch.float32)
    x = torch.randn(PROBES, width, generator=torch.Generator().manual_seed(0))
    before = x = x.to(first.device, wide)
    for factor in factors:
        x = factor(x)
    chord = F.normalize(x, dim=-1) - F.normalize(before, dim=-1)
    return float(2 * torch.arcsin(chord.norm(dim=-1).div(2).clamp_max(1)).mean())


def _method(spec: Spec) -> str:
    size = getattr(spec, "block_size", getattr(spec, "rank", None))
    return type(spec).__name__ + (f" {size}" if size else "")


def _lowering(site: Site, spec: Spec, rotations: int) -> str:
    if site.kind == "functional":
        return "folded on the fly"
    if site.shared:
        return "shared"
    return "grouped" if rotations > 1 and method_of(spec) is oft else "rotate"


def _fold_from(model: nn.Module | ExportedProgram, adapter: str, site: Site) -> int | None:
    if isinstance(model, (fx.GraphModule, ExportedProgram)) or site.kind != linear.KIND:
        return None
    layer: Any = model.get_submodule(site.weight.rpartition(".")[0])
    used = [turn for turn in layer.oft.values() if turn.enabled]
    found = foldable(used) if used == [layer.oft[adapter]] else None
    if found is None:
        return None
    block, outs = found
    return fold_from(outs, block, layer.weight.dtype, layer.weight.device)


def _bytes(held: Held) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in held.tensors.values())


def _base_bytes(model: nn.Module | ExportedProgram) -> int:
    base = {id(p): p for name, p in parameters_of(model).items() if not is_rotation(model, name)}
    return sum(parameter.numel() * parameter.element_size() for parameter in base.values())


def _graph(
    model: nn.Module | ExportedProgram,
    layer: str,
    sites: list[ExplainedSite],
    example_inputs: Any,
) -> LayerGraph | str:
    """The graph of one layer, or why there is none."""
    if layer == "auto":
        rows = [cell.row for cell in grid(site.fqn for site in sites).values()]
        layer = max(rows, key=rows.count)
    notes = {site.fqn: f"{site.in_features}→{site.out_features}" for site in sites}
    try:
        return layer_graph(model, layer, notes, example_inputs)
    except CaptureError as error:
        return str(error)


def _compiled(model: nn.Module | ExportedProgram, whole: bool) -> int:
    if isinstance(model, ExportedProgram):
        return 0
    parts = (m for m in model.modules() if m._compiled_call_impl is not None)
    return whole + sum(any(isinstance(m, Adapted) for m in part.modules()) for part in parts)


def _counts() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["oftfx"])
