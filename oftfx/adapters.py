"""Several adapters on one model: which are in use, how far, between which, and row by row."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from oftfx import copied, modules, sites
from oftfx.adapter import put
from oftfx.attach import records_of
from oftfx.capture import Model, unwrap
from oftfx.checkpoint import values_of
from oftfx.errors import PlanError
from oftfx.host import host_of
from oftfx.inserted import inserted
from oftfx.modules import Adapted
from oftfx.modules.rows import Rows
from oftfx.plan import Plan
from oftfx.rotations import is_fixed, is_free, is_linear
from oftfx.spec import Spec


@dataclass(frozen=True)
class Adapter:
    """One adapter of a model.

    Attributes:
        in_use: Whether the model's forward applies it.
        scale: How far along its rotations, as [`scale`][oftfx.scale] set it.
    """

    in_use: bool
    scale: float


def adapters(model: Model) -> dict[str, Adapter]:
    """A model's adapters by name: those in use in the order x meets them, then the others.

    Args:
        model: An nn.Module, GraphModule or ExportedProgram; adapted, or not.
    """
    inner = unwrap(model)
    if isinstance(inner, (fx.GraphModule, ExportedProgram)):
        found = dict.fromkeys(rotation.adapter for rotation in inserted(host_of(inner)))
        return dict.fromkeys(found, Adapter(in_use=True, scale=1.0))
    scales = {name: state.scaling for name, _, state in modules.holders(inner)}
    known = modules.in_order(inner)
    names = [*modules.in_use(inner), *(name for name, used in known.items() if not used)]
    return {name: Adapter(known[name], scales[name]) for name in names}


def use(model: Model, names: str | Sequence[str]) -> None:
    """Puts adapters to use, and no others.

    Several compose: with ``["a", "b"]`` a layer's input is rotated by a and the result by b,
    ``y = x·R_a·R_b·Wᵀ``, and [`merge`][oftfx.merge] folds ``W ← W·R_bᵀ·R_aᵀ``. The order matters.

    The parameters of adapters in use require gradients afterwards, the others' do not: training
    changes what the model computes. Freeze one of several by its parameters,
    ``for p in oftfx.parameters(model, "a"): p.requires_grad_(False)``. An adapter that is not in
    use costs its parameters' memory and nothing else.

    Args:
        model: An adapted nn.Module.
        names: One adapter, or several in the order x meets them; ``[]`` for the base alone.

    Raises:
        PlanError: The model has no such adapter, one is named twice, or it is a graph.
    """
    inner = _module(model)
    found = modules.chosen(inner, names)
    modules.select(inner, found)
    for name, _, state in modules.holders(inner):
        for key, parameter in state.named_parameters():
            if not is_fixed(key):
                parameter.requires_grad_(name in found)


def scale(model: Model, scale: float, name: str | None = None) -> None:
    """Sets how far along its rotations an adapter is applied: 0 is the base, 1 what was trained.

    Cayley rotations (OFT, COFT, BOFT, PSOFT, LOFT) are those of ``s·Q``, which turn the same planes
    by ``2·arctan(s·θ)``, orthogonal at every s; where they are made by a series, ‖s·Q‖ < 1 is
    asked for. GOFT's angles are multiplied, and those between HRA's pairs of directions.
    Magnitudes, GOFT's scales and PSOFT's vectors are multiplied as well. At 0 the output is bit for
    bit the base's, at 1 the unscaled one's. The parameters stay what they are: training goes on
    through the scale, [`merge`][oftfx.merge] folds what is applied, and [`save`][oftfx.save] writes
    what was trained.

    Args:
        model: An adapted nn.Module.
        scale: s, also beyond 1 or negative.
        name: One adapter; None for those in use.

    Raises:
        PlanError: The model has no such adapter, or its maps are free ones (qGOFT, LOFT with a free
            core), which no rotation leads to; or it is a graph, or s is not finite.
    """
    inner = _module(model)
    _check_number("scale", scale)
    names = modules.in_use(inner) if name is None else modules.chosen(inner, name)
    if not names:
        raise modules.absent(inner)
    found = [(fqn, state) for each in names for _, fqn, state in modules.holders(inner, each)]
    for each in names if scale != 1 else ():
        for _, _, copies in copied.of(inner, each):
            if copies.own:
                raise PlanError(
                    f"also_train: {each!r} trains {next(iter(copies.own))} as it is, which no "
                    "rotation leads to: oftfx.disabled(model) is all of the way back."
                )
    for fqn, state in found:
        if is_free(state.spec):
            raise PlanError(
                f"{fqn}: {type(state.spec).__name__} trains a free map, no rotation to go a part "
                "of: oftfx.disabled(model) is all of the way back."
            )
    for _, state in found:
        state.scaling = float(scale)


@torch.no_grad()
def interpolate(model: nn.Module, a: str, b: str, t: float, name: str = "mix") -> nn.Module:
    """Adds the adapter between two, ``Q = (1 − t)·Q_a + t·Q_b``: t = 0 is a, t = 1 is b.

    That is for methods whose parameters are the generators of rotations: the entries of Q of OFT,
    COFT, BOFT, PSOFT and LOFT, GOFT's angles. Every adapter between is one of the same method, as
    orthogonal as they are. Scales are left out of it.

    Args:
        model: An adapted nn.Module, changed in place.
        a: One adapter.
        b: Another, of the same method and sites.
        t: How far from a to b.
        name: Of the new adapter, which is not in use until [`use`][oftfx.use] puts it to.

    Returns:
        The model.

    Raises:
        PlanError: The model has no such adapters, they differ in more than their parameters, or
            their method has no such generators (HRA, qGOFT, LOFT with a free core); or ``name`` is
            taken.
    """
    inner = _module(model)
    _check_number("t", t)
    modules.chosen(inner, [a, b])
    plan, other = (records_of(inner, each)[each].plan for each in (a, b))
    _check_alike(plan, other, a, b)
    ends = [values_of(inner, plan, each) for each in (a, b)]
    for key in filter(is_fixed, ends[0]):
        if not torch.equal(ends[0][key], ends[1][key]):
            raise PlanError(f"{key} of {a!r} and {b!r} differ: there is no rotation between them.")
    used = modules.in_use(inner)
    put(inner, plan, name, fixed=dict)
    modules.select(inner, used)
    for key, value in values_of(inner, plan, name).items():
        value.copy_(torch.lerp(ends[0][key], ends[1][key], t)).requires_grad_(False)
    return model


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within it, each row of a batch goes through an adapter of its own, in one forward.

    Every layer multiplies the whole batch by its weight at once. A row's result is that of its
    adapter alone, whatever the others are; gradients reach every adapter that requires them. It
    works in eager mode, compiled, and in ``generate``. A new assignment of the same adapters needs
    no new compilation. A checkpointed region is run again by ``backward``, which belongs inside.

    Args:
        model: An adapted nn.Module, which is called with as many rows as there are names, batch
            first. A layer that reads several tensors a row, one row's after the other's (tokens
            flattened into the batch, beams of a search), takes them for that row's.
        names: For each row an adapter, or None for the base.

    Raises:
        PlanError: The model has no such adapter or is a graph; a site of one is folded on the fly
            or belongs to an expert, neither of which knows of rows; or, at the forward, a layer
            reads a tensor whose first axis is no multiple of the rows.
    """
    inner = _module(model)
    if isinstance(names, str) or not names:
        raise PlanError(f"names={names!r}: must be one adapter or None for each row of the batch.")
    # In one order whoever comes first, so that a compiled model knows them again.
    found = modules.chosen(inner, sorted({name for name in names if name is not None}))
    for each in found:
        _check_rows(inner, each)
    device = next(inner.parameters()).device
    which = torch.tensor([0 if n is None else found.index(n) + 1 for n in names], device=device)
    adapted = [module for module in inner.modules() if isinstance(module, Adapted)]
    before = [module.oft_rows for module in adapted]
    with modules.kept(inner):
        modules.select(inner, found)
        try:
            for module in adapted:
                module.oft_rows = Rows(tuple(found), which)
            yield
        finally:
            for module, rows in zip(adapted, before, strict=True):
                vars(module).pop("oft_rows", None)
                if rows is not None:
                    module.oft_rows = rows


def _module(model: Model) -> nn.Module:
    inner = unwrap(model)
    if isinstance(inner, (fx.GraphModule, ExportedProgram)):
        raise PlanError(
            f"{type(inner).__name__}: a graph applies all that it holds: do this to the nn.Module "
            "and trace it anew, or take adapters out by oftfx.remove."
        )
    return inner


def _check_number(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PlanError(f"{what}={value!r}: must be a finite number.")


def _check_alike(plan: Plan, other: Plan, a: str, b: str) -> None:
    """That two adapters differ in their parameters alone."""
    there = {site.fqn: site for site in other.sites}
    for site in plan.sites:
        spec = plan.spec_of(site)
        if not is_linear(spec):
            raise PlanError(
                f"{site.fqn}: the parameters of {type(spec).__name__} are no generators of its "
                "rotations: between two of them is none."
            )
        twin = there.pop(site.fqn, None)
        if twin is None or twin.rotation != site.rotation:
            raise PlanError(f"{site.fqn} is adapted by {a!r} otherwise than by {b!r}.")
        if _map_of(spec) != _map_of(other.spec_of(twin)):
            raise PlanError(f"{site.fqn}: the specs of {a!r} and {b!r} differ.")
    if there:
        raise PlanError(f"{next(iter(there))} is adapted by {b!r}, but not by {a!r}.")


def _map_of(spec: Spec) -> Spec:
    """The spec, less what does not say which map its parameters make."""
    return dataclasses.replace(spec.without_rules(), seed=0, init_std=0.0)


def _check_rows(model: nn.Module, name: str) -> None:
    """That every layer of an adapter meets the rows in their order."""
    for _, _, copies in copied.of(model, name):
        if copies.own:
            raise PlanError(
                f"also_train: {name!r} trains {next(iter(copies.own))} as it is, which all rows "
                "share: run the rows apart."
            )
    for fqn, module in model.named_modules():
        if not isinstance(module, Adapted) or name not in module.oft:
            continue
        if isinstance(module.oft[name], nn.ModuleDict):
            raise PlanError(
                f"{fqn or type(module).__name__}: {name!r} is folded into its weight on the fly, "
                "which all rows share: exclude the site, or run the rows apart."
            )
        if sites.is_embedding(module):
            raise PlanError(
                f"{fqn}: {name!r} rotates an embedding, whose input is no tensor of rows: exclude "
                "it, or run the rows apart."
            )
        if "experts" in fqn.split("."):
            raise PlanError(
                f"{fqn}: {name!r} adapts an expert, which reads the tokens that were sent to it in "
                "an order of their own: exclude the experts, or run the rows apart."
            )
