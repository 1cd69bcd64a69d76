"""How each site of an adapted model is run, how far it has turned, and what compiling did to it."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from oftfx import insert
from oftfx.attach import record_holder
from oftfx.capture import Model, unwrap
from oftfx.errors import PlanError
from oftfx.health import Held, health, rotations_of
from oftfx.host import host_of
from oftfx.modules import Adapted
from oftfx.ops.cost import fold_from
from oftfx.plan import Plan, Site
from oftfx.rotations import method_of, oft
from oftfx.sites import linear
from oftfx.spec import Spec
from oftfx.table import compact, counted, shape_of, table

WHOLE = ("graphs", "rotations", "cores")
"""Which of the backend's counts are of what it was given; the others are of what it did."""


@dataclass(frozen=True)
class ExplainedSite:
    """One adapted weight.

    Attributes:
        fqn: The site, as in its plan.
        adapter: Name of the adapter.
        kind: As in its plan.
        in_features: Width of the input, which is rotated.
        out_features: Width of the output.
        method: The method and its size: the width of a block, or how many directions.
        lowering: How it is run: "rotate" its input; "grouped", in one op with the other readers of
            its input; "shared", by another site's rotation, once for all; "folded on the fly" into
            the weight, in every forward.
        norm: ‖Q‖₂, as in [`Health`][oftfx.Health].
        orthogonality_error: ‖RᵀR − I‖₂, likewise.
        num_trainable: Trainable numbers it holds; 0 when another site holds them.
        bytes: Of its parameters.
        fold_from: From so many rows of its input on, the tokens of a batch, an eager training step
            folds its weight instead; None where it never does.
    """

    fqn: str
    adapter: str
    kind: str
    in_features: int
    out_features: int
    method: str
    lowering: str
    norm: float
    orthogonality_error: float
    num_trainable: int
    bytes: int
    fold_from: int | None = None


@dataclass(frozen=True)
class Explanation:
    """What [`explain`][oftfx.explain] found.

    ``str()`` is a table: equal layers in one row, with the worst of their norms and errors.

    Attributes:
        sites: In the order of the plans.
        compiled: How many parts of the model are compiled, each by itself.
        counts: What ``backend="oftfx"`` counted in this process so far, of all models: the graphs,
            rotations and cores it was given, how many ops each pass saved or fused, and under
            ``…_left`` how many it could not, for the reasons that the pass's own text gives.
    """

    sites: tuple[ExplainedSite, ...]
    compiled: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def __str__(self) -> str:
        alike: dict[tuple[str, ...], list[ExplainedSite]] = {}
        for site in self.sites:
            row = (shape_of(site.fqn), site.adapter, site.kind, _size(site), site.method)
            alike.setdefault((*row, _run(site), f"{site.num_trainable:,}"), []).append(site)
        adapters = {site.adapter for site in self.sites}
        rows = [
            (
                compact([site.fqn for site in members]),
                f"{len(members)}",
                *([adapter] if len(adapters) > 1 else []),
                *row,
                f"{max(site.norm for site in members):.4f}",
                f"{max(site.orthogonality_error for site in members):.1e}",
                trainable,
                _mebibytes(sum(site.bytes for site in members)),
            )
            for (_, adapter, *row, trainable), members in alike.items()
        ]
        which = ["adapter"] if len(adapters) > 1 else []
        how = ("kind", "in×out", "method", "run", "‖Q‖", "orthogonality", "trainable", "MiB")
        right = "× in×out ‖Q‖ orthogonality trainable MiB"
        lines = [table(("site", "×", *which, *how), rows, right), ""]
        return "\n".join([*lines, self._total(), *self._compilation()])

    def _total(self) -> str:
        size = sum(site.bytes for site in self.sites)
        return (
            f"{counted(len(self.sites), 'site')}, "
            f"{sum(site.num_trainable for site in self.sites):,} trainable parameters of "
            f"{_mebibytes(size)} MiB; {_mebibytes(4 * size)} with gradients and AdamW's state"
        )

    def _compilation(self) -> Iterator[str]:
        if self.compiled:
            given = ", ".join(counted(self.counts.get(name, 0), name[:-1]) for name in WHOLE)
            done = (f"{name} {n}" for name, n in self.counts.items() if name not in WHOLE)
            yield f"{counted(self.compiled, 'part')} compiled; so far, {given}"
            yield f"passes: {', '.join(done) or 'none has run'}"


def explain(model: Model, name: str | None = None) -> Explanation:
    """How each site of an adapted model is run, and how far it has turned.

    Args:
        model: An adapted nn.Module, GraphModule or ExportedProgram.
        name: One adapter; None for all.

    Raises:
        PlanError: The model has no adapter (or none of this name), or is a trace that remembers no
            plan.
    """
    inner = unwrap(model)
    sites = [
        site
        for adapter, plan in _plans(inner).items()
        if name in (None, adapter)
        for site in _explained(inner, adapter, plan)
    ]
    if not sites:
        rotations_of(inner, name)  # says what is missing, unless only the plan is
        raise PlanError("the model does not say how it was adapted: explain what it was made from.")
    compiled = _compiled(inner, whole=inner is not model)
    return Explanation(tuple(sites), compiled, _counts() if compiled else {})


def _plans(model: nn.Module | ExportedProgram) -> dict[str, Plan]:
    if isinstance(model, (fx.GraphModule, ExportedProgram)):
        return insert.plans(host_of(model))
    return {name: record.plan for name, record in record_holder(model).items()}


def _explained(
    model: nn.Module | ExportedProgram, adapter: str, plan: Plan
) -> Iterator[ExplainedSite]:
    held = {rotation.site: rotation for rotation in rotations_of(model, adapter)}
    known = health(model, adapter)
    errors = zip(known.norm.tolist(), known.orthogonality_error.tolist(), strict=True)
    turned = dict(zip(known.fqns, errors, strict=True))
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
            _fold_from(model, adapter, site),
        )


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
    turn = layer.oft[adapter]
    outs = (turn.out,) if turn.readers is None else turn.readers.outs
    block = getattr(turn, "rotation", turn).block
    if block is None or turn.outputs or len(layer.oft) > 1:
        return None
    return fold_from(outs, block, layer.weight.dtype, layer.weight.device)


def _bytes(held: Held) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in held.tensors.values())


def _compiled(model: nn.Module | ExportedProgram, whole: bool) -> int:
    if isinstance(model, ExportedProgram):
        return 0
    parts = (m for m in model.modules() if m._compiled_call_impl is not None)
    return whole + sum(any(isinstance(m, Adapted) for m in part.modules()) for part in parts)


def _counts() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["oftfx"])


def _run(site: ExplainedSite) -> str:
    return site.lowering + (f", {site.fold_from} rows fold" if site.fold_from else "")


def _size(site: ExplainedSite) -> str:
    return f"{site.in_features}×{site.out_features}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"
