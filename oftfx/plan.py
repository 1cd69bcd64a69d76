"""What will be adapted, as pure data: printable, JSON, hashable."""

import dataclasses
import difflib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from torch import fx, nn

from oftfx import match, modules, sites
from oftfx.capture import Capture, Model, capture, unwrap
from oftfx.errors import OftfxError, PlanError, SpecError
from oftfx.match import Use
from oftfx.rotations import method_of, num_trainable, output_shapes
from oftfx.sites.embedding import KIND as EMBEDDING
from oftfx.sites.matmul import Layout
from oftfx.sites.quantised import Quantiser
from oftfx.spec import ALL_LINEAR, Spec, Target, matches
from oftfx.table import plan_table


@dataclass(frozen=True)
class Site:
    """One frozen weight whose matmul gets a rotation on its input.

    Attributes:
        fqn: Name of the weight without a trailing ".weight": for a layer, the layer's own name.
        kind: "functional" folds on the fly; "embedding" rotates what is looked up; all others
            ("linear", "conv1d", "linear4bit", …) rotate the layer's input.
        weight: Full name of the parameter.
        in_features: Width of the input, or of an embedding, which is rotated.
        out_features: Width of the output, or the number of an embedding's rows.
        layout: How the weight is stored, "out_in" or "in_out".
        group: Number of the input tensor; sites that read the same tensor have the same group.
        rotation: fqn of the site that holds this site's parameters: itself, unless shared.
        num_trainable: Trainable numbers this site holds; those of a shared rotation count where
            they are held.
        tied: Whether the weight has other names; merging then gives this site its own copy.
    """

    fqn: str
    kind: str
    weight: str
    in_features: int
    out_features: int
    layout: Layout
    group: int
    rotation: str
    num_trainable: int
    tied: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight as it is stored."""
        shape = (self.out_features, self.in_features)
        return shape if self.layout == "out_in" else shape[::-1]

    @property
    def shared(self) -> bool:
        """Whether the rotation belongs to another site."""
        return self.rotation != self.fqn


@dataclass(frozen=True)
class Group:
    """Sites that read one tensor."""

    index: int
    in_features: int
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Skip:
    """A weight that is left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Copied:
    """A tensor of the base of which a copy is trained as it is (``also_train``)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Which sites a spec adapts in a model.

    Attributes:
        spec: The spec it was made from.
        sites: In the order of the graph.
        skipped: Weights of two or more dimensions that stay as they are.
        capture: "graph" when it was read off a graph; "modules" when off the module tree, which
            knows neither functional matmuls nor shared inputs.
        copied: Tensors that are trained as they are.
    """

    spec: Spec
    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]
    capture: Literal["graph", "modules"] = "graph"
    copied: tuple[Copied, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The sites by the tensor they read."""
        members: dict[int, list[Site]] = {}
        for site in self.sites:
            members.setdefault(site.group, []).append(site)
        return tuple(
            Group(index, group[0].in_features, tuple(site.fqn for site in group))
            for index, group in members.items()
        )

    @property
    def num_trainable(self) -> int:
        """Trainable numbers of all sites, and of the tensors that are trained as they are."""
        whole = sum(math.prod(copied.shape) for copied in self.copied)
        return whole + sum(site.num_trainable for site in self.sites)

    def spec_of(self, site: Site) -> Spec:
        """The spec that holds at a site, overrides applied."""
        return self.spec.at(site.rotation)

    def seed_of(self, fqn: str) -> int:
        """Seed of the initial values that a site holds: the same whatever else is adapted."""
        return zlib.crc32(f"{self.spec.seed}/{fqn}".encode())

    def to_json(self) -> str:
        """The plan as JSON text; a callable ``targets`` becomes the names it chose."""
        spec = self.spec
        if callable(spec.targets):
            spec = dataclasses.replace(spec, targets=tuple(re.escape(s.fqn) for s in self.sites))
        return json.dumps(
            {
                "spec": spec.to_json(),
                "capture": self.capture,
                "sites": [dataclasses.asdict(site) for site in self.sites],
                "skipped": [dataclasses.asdict(skip) for skip in self.skipped],
                "copied": [dataclasses.asdict(copied) for copied in self.copied],
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan that [`to_json`][oftfx.Plan.to_json] wrote.

        Raises:
            PlanError: The text is no plan.
            SpecError: Its spec is not valid in this version.
        """
        try:
            data = json.loads(text)
            return cls(
                spec=Spec.from_json(data["spec"]),
                sites=tuple(Site(**site) for site in data["sites"]),
                skipped=tuple(Skip(**skip) for skip in data["skipped"]),
                capture=data["capture"],
                copied=tuple(
                    Copied(copied["name"], tuple(copied["shape"]))
                    for copied in data.get("copied", ())
                ),
            )
        except OftfxError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"this is no plan written by oftfx: {error!r}.") from error

    def __str__(self) -> str:
        return plan_table(self)


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
    """
    model = unwrap(model)
    _check_types(model, spec)
    if capture == "modules":
        if not isinstance(model, nn.Module):
            raise PlanError('capture="modules" walks a module tree; an ExportedProgram has none.')
        return _choose(_candidates_of_modules(model, spec), spec, _copied(model, spec), "modules")
    candidates = _candidates_of_graph(model, example_inputs)
    return _choose(candidates, spec, _copied(model, spec), "graph")


def _check_types(model: Any, spec: Any) -> None:
    if not isinstance(spec, Spec):
        raise SpecError(
            f"spec is a {type(spec).__name__}: it must be a spec such as oftfx.OFT(block_size=32)."
        )
    if not isinstance(model, Model):
        raise PlanError(
            f"model is a {type(model).__name__}: it must be an nn.Module, a torch.fx.GraphModule "
            "or a torch.export.ExportedProgram."
        )


@dataclass(frozen=True)
class _Candidate:
    """A weight as found: a site if chosen, a skip with `role` as reason if left out by default."""

    site: Site
    role: str = ""
    why_not: str = ""
    broken: bool = False
    """Whether gradients end there or are wrong: leaving it out must be asked for by name."""


def _candidates_of_graph(model: Model, example_inputs: Any) -> list[_Candidate]:
    found = capture(model, example_inputs)
    all_uses = match.uses(found)
    heads = match.output_heads(found, all_uses) | _known_heads(model, all_uses)
    routers = match.routers(all_uses)
    by_weight: dict[str, list[Use]] = {}
    for use in all_uses:
        by_weight.setdefault(use.weight, []).append(use)

    groups: dict[Any, int] = {}
    candidates = []
    for weight, reads in by_weight.items():
        tensor = found.tensors[weight]
        if tensor.dim() < 2 or modules.is_rotation(weight):
            continue
        fitting = [use for use in reads if use.x is not None]
        fault = _fault(model, weight)
        why_not = _why_not(found, weight, reads) or fault
        role = ""
        if any(use.node in heads for use in fitting):
            role = "output head"
        elif any(use.node in routers for use in fitting):
            role = "MoE router"
        elif not fitting and _is_embedding(model, weight):
            role, why_not = EMBEDDING, ""
        layout: Layout = fitting[0].layout if fitting else "out_in"
        out, width = tensor.shape[-2:] if layout == "out_in" else reversed(tensor.shape[-2:])
        sources = {(use.source, width) for use in fitting}
        key = sources.pop() if len(sources) == 1 else weight
        fqn = weight.removesuffix(".weight")
        site = Site(
            fqn=fqn,
            kind=role if role == EMBEDDING else _kind(model, fqn, weight, fitting),
            weight=weight,
            in_features=width,
            out_features=out,
            layout=layout,
            group=groups.setdefault(key, len(groups)),
            rotation=fqn,
            num_trainable=0,
            tied=len(found.aliases[weight]) > 1,
        )
        candidates.append(_Candidate(site, role, why_not, broken=bool(fault)))
    used = {name for use in all_uses for name in found.aliases[use.weight]}
    for name, tensor in found.tensors.items():
        if name not in used and tensor.dim() >= 2 and not modules.is_rotation(name):
            out, width = tensor.shape[-2:]
            fqn = name.removesuffix(".weight")
            site = Site(fqn, "unused", name, width, out, "out_in", len(groups), fqn, 0)
            candidates.append(_Candidate(site, why_not="never used in the captured forward"))
    return candidates


def _why_not(found: Capture, weight: str, reads: list[Use]) -> str:
    """Why no rotation fits a weight, given all that reads it; empty when one does."""
    tensor = found.tensors[weight]
    odd = [use.why_not for use in reads if use.x is None]
    if len(odd) == len(reads):
        return f"read by {odd[0]}, no matmul this version rotates"
    if not tensor.is_floating_point():
        return f"its weight is {str(tensor.dtype).removeprefix('torch.')}, not floating point"
    if odd:
        return f"besides a matmul, {odd[0]} reads the same weight, which folding would change"
    if len({use.layout for use in reads}) > 1:
        return "it is used both as x·Wᵀ and as x·W, which no one rotation serves"
    return ""


def _is_embedding(model: Model, weight: str) -> bool:
    """Whether a weight is that of an embedding that an nn.Module, no graph, looks up."""
    owner, _, parameter = weight.rpartition(".")
    if not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule):
        return False
    return parameter == "weight" and sites.is_embedding(model.get_submodule(owner))


def _fault(model: Model, weight: str) -> str:
    """Why nothing can be trained through the quantised layer of this weight, if it is one's."""
    owner, _, parameter = weight.rpartition(".")
    if not isinstance(model, nn.Module) or parameter != "weight":
        return ""
    return _fault_of(model.get_submodule(owner))


def _fault_of(module: nn.Module) -> str:
    quantiser = sites.quantiser_of(module)
    if quantiser is None:
        return ""
    if fault := quantiser.fault(module):
        return fault
    if quantiser.blocks(module):
        name = type(module).__name__
        return f"the backward of this {quantiser.KIND} {name} gives no gradient to its input"
    return ""


def _kind(model: Model, fqn: str, weight: str, fitting: list[Use]) -> str:
    """A provider's kind where a module's own forward does the matmul, else "functional"."""
    own = (_is_owner(model, use.owner, fqn) for use in fitting)
    if not fitting or not weight.endswith(".weight") or not all(own):
        return "functional"
    if isinstance(model, nn.Module):
        provider = sites.provider_of(model.get_submodule(fqn))
    else:
        stack = fitting[0].node.meta.get("nn_module_stack") or {"": ("", "")}
        cls = next(reversed(stack.values()))[1]
        name = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
        provider = sites.provider_named(name)
    return provider.KIND if provider else "functional"


def _is_owner(model: Model, owner: str, fqn: str) -> bool:
    """Whether a call stack's module is the weight's: by its end, or by another of its names."""
    if owner == fqn or fqn.endswith("." + owner):
        return True
    names = (
        dict(model.named_modules(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    )
    return owner in names and names[owner] is names.get(fqn)


def _known_heads(model: Model, found: Iterable[Use]) -> set[Any]:
    """Heads that a transformers model names itself, which a graph alone would not show."""
    base = getattr(model, "base_model", None)
    named = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(model, nn.Module) or not isinstance(base, nn.Module):
        return set()
    inside = {id(module) for module in base.modules()}
    heads = set()
    for use in found:
        owner = use.weight.rpartition(".")[0]
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue
        if use.x is not None and (module is named or id(module) not in inside):
            heads.add(use.node)
    return heads


def _candidates_of_modules(model: nn.Module, spec: Spec) -> list[_Candidate]:
    if spec.share_inputs:
        raise PlanError(
            "share_inputs needs to know which layers read the same tensor, which only a graph "
            'tells: use capture="graph", or share_inputs=False.'
        )
    named = getattr(model, "get_output_embeddings", lambda: None)()
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    candidates = []
    for index, (fqn, module) in enumerate(model.named_modules()):
        shape = sites.shape_of(module, "weight")
        if shape is None or len(shape) < 2:
            continue
        weight = getattr(module, "weight", None)
        provider = sites.provider_of(module)
        why_not = f"{type(module).__name__} is no linear layer this version knows"
        layout: Layout = "out_in"
        fault = _fault_of(module)
        if isinstance(provider, Quantiser):
            why_not = fault
        elif provider is not None and weight is not None:
            layout = provider.LAYOUT
            why_not = "" if weight.is_floating_point() else f"its weight is {weight.dtype}"
        out, width = shape[-2:] if layout == "out_in" else reversed(shape[-2:])
        kind = provider.KIND if provider else "module"
        role = "output head" if module is named else ""
        if sites.is_embedding(module):
            kind, role, why_not = EMBEDDING, EMBEDDING, ""
        tied = names[id(weight)] > 1
        site = Site(fqn, kind, f"{fqn}.weight", width, out, layout, index, fqn, 0, tied)
        candidates.append(_Candidate(site, role, why_not, broken=bool(fault)))
    return candidates


def _copied(model: Model, spec: Spec) -> tuple[Copied, ...]:
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
    held = {name: value for name, value in held.items() if not modules.is_rotation(name)}
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
            chosen[name] = Copied(name, tuple(held[name].shape))
    return tuple(chosen[name] for name in held if name in chosen)


def _names(rule: Target, parameter: str) -> bool:
    """Whether a rule names a parameter or a module that it is in."""
    path = parameter.split(".")
    return any(matches(rule, ".".join(path[:end])) for end in range(1, len(path) + 1))


def _choose(
    candidates: list[_Candidate],
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
    return Plan(spec, _with_parameters(chosen, spec), tuple(skipped), how, copied)


def _no_matmul(spec: Spec, site: Site) -> str | None:
    """Why a spec does not fit an embedding; None when it does, or when the site is none."""
    if site.kind != EMBEDDING:
        return None
    if output_shapes(spec, site.out_features):
        return "magnitude=True scales the outputs of a matmul, and an embedding has none"
    if method_of(spec).FIXED:
        return f"{type(spec).__name__}'s directions are those of a matmul's input, not an embedding"
    return None


def _wanted(candidates: list[_Candidate], spec: Spec) -> Callable[[_Candidate], bool]:
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
