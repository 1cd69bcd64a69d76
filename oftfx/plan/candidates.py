"""Every weight of a model that could be a site, and why the others cannot."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from oftfx import match, modules, sites
from oftfx.capture import Capture, Model, capture
from oftfx.errors import PlanError
from oftfx.match import Use
from oftfx.plan.records import Site
from oftfx.sites.bitsandbytes import repacked_by
from oftfx.sites.embedding import KIND as EMBEDDING
from oftfx.sites.matmul import Layout
from oftfx.sites.quantised import Quantiser
from oftfx.spec import Spec

UNUSED = "never used in the captured forward, or where torch.compile skips the code"
"""Of a weight that no graph reads; the module tree knows it if its layer is what is called."""


@dataclass(frozen=True)
class Candidate:
    """A weight as found: a site if chosen, a skip with `role` as reason if left out by default."""

    site: Site
    role: str = ""
    why_not: str = ""
    broken: bool = False
    """Whether gradients end there or are wrong: leaving it out must be asked for by name."""


def of_graph(model: Model, example_inputs: Any) -> list[Candidate]:
    """Off the graph of a model's forward, in its order; then the weights that it never reads."""
    found = capture(model, example_inputs)
    all_uses = match.uses(found)
    heads = match.output_heads(found, all_uses, _vocabularies(model))
    heads |= _known_heads(model, all_uses)
    routers = match.routers(all_uses)
    by_weight: dict[str, list[Use]] = {}
    for use in all_uses:
        by_weight.setdefault(use.weight, []).append(use)

    groups: dict[Any, int] = {}
    candidates = []
    for weight, reads in by_weight.items():
        tensor = found.tensors[weight]
        if tensor.dim() < 2 or modules.is_rotation(model, weight):
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
        candidates.append(Candidate(site, role, why_not, broken=bool(fault)))
    used = {name for use in all_uses for name in found.aliases[use.weight]}
    for name, tensor in found.tensors.items():
        if name not in used and tensor.dim() >= 2 and not modules.is_rotation(model, name):
            out, width = tensor.shape[-2:]
            fqn = name.removesuffix(".weight")
            site = Site(fqn, "unused", name, width, out, "out_in", len(groups), fqn, 0)
            candidates.append(Candidate(site, why_not=UNUSED))
    return candidates


def _why_not(found: Capture, weight: str, reads: list[Use]) -> str:
    """Why no rotation fits a weight, given all that reads it; empty when one does."""
    tensor = found.tensors[weight]
    odd = [use.why_not for use in reads if use.x is None]
    if len(odd) == len(reads):
        return repacked_by(odd[0]) or f"read by {odd[0]}, no matmul this version rotates"
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
    if quantiser.ends_gradient(module):
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


def _vocabularies(model: Model) -> set[int] | None:
    """The rows of the embedding of tokens that a transformers model names, if it names what it has.

    Others, such as that of positions, often have as many rows as a layer has outputs.
    """
    try:
        table = model.get_input_embeddings()  # type: ignore[union-attr, operator]
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(table, "weight", None)
    return {len(weight)} if weight is not None and weight.dim() == 2 else set()


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


def of_modules(model: nn.Module, spec: Spec) -> list[Candidate]:
    """Off the module tree, which knows neither functional matmuls nor shared inputs.

    Raises:
        PlanError: The spec shares rotations by input.
    """
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
        elif isinstance(module, NonDynamicallyQuantizableLinear):
            why_not = "nn.MultiheadAttention reads its weight, and never calls it"
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
        candidates.append(Candidate(site, role, why_not, broken=bool(fault)))
    return candidates
