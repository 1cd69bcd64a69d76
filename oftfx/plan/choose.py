"""Which of the candidates a spec wants, and what it trains beside them."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from oftfx import modules, sites
from oftfx.capture import Model
from oftfx.errors import PlanError
from oftfx.plan.candidates import Candidate
from oftfx.plan.records import Copied, Plan, Site, Skip
from oftfx.rotations import method_of, num_trainable, output_shapes
from oftfx.sites.embedding import KIND as EMBEDDING
from oftfx.spec import ALL_LINEAR, Spec, Target, matches


def choose(
    candidates: list[Candidate],
    spec: Spec,
    copied: tuple[Copied, ...],
    how: Literal["graph", "modules"],
) -> Plan:
    """Applies the spec's rules to what was found."""
    whole = {tensor.name for tensor in copied}
    wanted = _wanted(candidates, spec)
    explicit = spec.targets != ALL_LINEAR
    exclude = cast("tuple[Target, ...]", spec.exclude)  # normalised by Spec
    chosen, skipped, errors = [], [], []
    for candidate in candidates:
        site = candidate.site
        if any(matches(rule, site.fqn) for rule in exclude):
            skipped.append(Skip(site.fqn, "excluded"))
        elif site.weight in whole:
            skipped.append(Skip(site.fqn, "trained as it is"))
        elif not wanted(candidate) and not candidate.broken:
            default = candidate.role or candidate.why_not
            skipped.append(Skip(site.fqn, "not a target" if explicit else default))
        elif candidate.why_not:
            errors.append(f"{site.fqn}: {candidate.why_not}")
        else:
            at = spec.at(site.fqn)
            misfit = method_of(at).misfit(at, site.in_features) or _no_matmul(at, site)
            if misfit:
                errors.append(f"{site.fqn}: {misfit}")
            chosen.append(site)
    if errors:
        listed = "\n  ".join(errors[:10] + (["…"] if len(errors) > 10 else []))
        raise PlanError(
            f"{len(errors)} of the targeted sites cannot be adapted:\n  {listed}\n"
            "Leave them out with exclude=, or change their fields with overrides=."
        )
    if not chosen:
        reasons = "\n  ".join(f"{skip.name}: {skip.reason}" for skip in skipped[:10])
        raise PlanError(
            "nothing to adapt: no matmul with a frozen weight is left"
            + (f". Skipped:\n  {reasons}" if reasons else " in this model.")
        )
    plan = Plan(spec, _with_parameters(chosen, spec), tuple(skipped), how, copied)
    for site in plan.sites:
        for tensor in plan.shapes(site):
            if f"{site.fqn}.{tensor}" in whole:
                raise PlanError(
                    f"also_train: {site.fqn}.{tensor} is called as what {type(spec).__name__} "
                    f"trains at {site.fqn}, and files have one tensor of a name: rename it, or "
                    "exclude the site."
                )
    return plan


def _no_matmul(spec: Spec, site: Site) -> str | None:
    """Why a spec does not fit an embedding; None when it does, or when the site is none."""
    if site.kind != EMBEDDING:
        return None
    if output_shapes(spec, site.out_features):
        return "magnitude=True scales the outputs of a matmul, and an embedding has none"
    if method_of(spec).FIXED:
        return f"{type(spec).__name__}'s directions are those of a matmul's input, not an embedding"
    return None


def _wanted(candidates: list[Candidate], spec: Spec) -> Callable[[Candidate], bool]:
    """The choice that ``targets`` makes, once every rule is known to match something."""
    names = [candidate.site.fqn for candidate in candidates]
    targets: Any = spec.targets
    by_rule = targets != ALL_LINEAR and not callable(targets)
    for field, rules in (
        ("targets", targets if by_rule else ()),
        ("exclude", spec.exclude),
        ("overrides", spec.overrides),
    ):
        for rule in cast("Iterable[Target]", rules):
            if not any(matches(rule, name) for name in names):
                raise PlanError(
                    f"{field}: {getattr(rule, 'pattern', rule)!r} matches no weight of this model"
                    f"{_near_misses(rule, names)}"
                )
    if by_rule:
        return lambda candidate: any(matches(rule, candidate.site.fqn) for rule in targets)
    if callable(targets):
        return lambda candidate: (
            not candidate.why_not and candidate.role != EMBEDDING and bool(targets(candidate.site))
        )
    return lambda candidate: not candidate.role and not candidate.why_not


def _near_misses(rule: Any, names: list[str]) -> str:
    text = getattr(rule, "pattern", rule)
    leaves = {name.rpartition(".")[2] for name in names}
    close = difflib.get_close_matches(text, [*leaves, *names], n=5, cutoff=0.5)
    listed = close or sorted(leaves)[:10]
    return f"; near misses: {', '.join(listed)}." if close else f"; it has: {', '.join(listed)}."


def _with_parameters(chosen: list[Site], spec: Spec) -> tuple[Site, ...]:
    """Decides which site holds each rotation and counts its parameters."""
    holders: dict[int, Site] = {}
    out = []
    for site in chosen:
        holder = holders.setdefault(site.group, site) if spec.share_inputs else site
        at = spec.at(holder.fqn)
        if at != spec.at(site.fqn):
            raise PlanError(
                f"share_inputs: {site.fqn} and {holder.fqn} read the same tensor, but overrides "
                "give them different fields; give both the same, or exclude one."
            )
        held = num_trainable(at, site.in_features) if holder is site else 0
        held += sum(math.prod(shape) for shape in output_shapes(at, site.out_features).values())
        out.append(dataclasses.replace(site, rotation=holder.fqn, num_trainable=held))
    return tuple(out)


def copied(model: Model, spec: Spec) -> tuple[Copied, ...]:
    """The tensors that ``also_train`` names, each under one of its modules' names."""
    rules = cast("tuple[Target, ...]", spec.also_train)
    if not rules:
        return ()
    if not isinstance(model, nn.Module):
        raise PlanError("also_train: an ExportedProgram's tensors cannot be told apart by module.")
    held = {
        f"{fqn}.{leaf}" if fqn else leaf: parameter
        for fqn, module in model.named_modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }
    held = {name: value for name, value in held.items() if not modules.is_rotation(model, name)}
    packed = sites.quantised_layers(model)
    chosen: dict[str, Copied] = {}
    for rule in rules:
        named = [name for name in held if _names(rule, name)]
        if not named:
            raise PlanError(
                f"also_train: {getattr(rule, 'pattern', rule)!r} matches no parameter and no module"
                f" that has any{_near_misses(rule, list(held))}"
            )
        for name in named:
            if name in packed or not held[name].is_floating_point():
                raise PlanError(
                    f"also_train: {name} is quantised and cannot be trained as it is: leave its "
                    "layer out of the quantisation, or rotate it instead."
                )
            if _has_statistics(model.get_submodule(name.rpartition(".")[0])):
                raise PlanError(
                    f"also_train: {name} is of a norm with running statistics, which training "
                    "moves and no adapter saves: leave it out, and keep the norm in eval()."
                )
            chosen[name] = Copied(name, tuple(held[name].shape))
    return tuple(chosen[name] for name in held if name in chosen)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats


def _names(rule: Target, parameter: str) -> bool:
    """Whether a rule names a parameter or a module that it is in."""
    path = parameter.split(".")
    return any(matches(rule, ".".join(path[:end])) for end in range(1, len(path) + 1))
