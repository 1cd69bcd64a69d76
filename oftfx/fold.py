"""Rotations → weights: ``W ← W Mᵀ``, block by block, and what that cost.

    before                          after
    x_r = rotate(x, core)           y = linear(x, W', b)      W' = W·blockdiag(I + C_i)ᵀ
    y   = linear(x_r, W, b)

The fold is the rotation itself, applied to the rows of W with the cores transposed, so nothing of
the size in×in ever exists. Two adapters x·R1·R2 fold in reverse, W·R2ᵀ·R1ᵀ.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from oftfx import insert, match, sites
from oftfx.adapter import parameters, remove
from oftfx.attach import detach
from oftfx.capture import read, unwrap
from oftfx.errors import MergeError, OftfxWarning, PlanError
from oftfx.host import Host, host_of
from oftfx.modules import Adapted, Rotation, SharedRotation, bare, site_name
from oftfx.ops.factor import Factor
from oftfx.sites import pretrained
from oftfx.sites.matmul import is_view_of_weight, parameter_behind, tensor_behind
from oftfx.sites.quantised import Quantiser, device_of, to_linear
from oftfx.table import table

M = TypeVar("M", nn.Module, ExportedProgram)


@dataclass(frozen=True)
class MergedSite:
    """What folding one site cost; the errors are relative (2-norm).

    Attributes:
        fqn: The site.
        output_error: Change of the output on random inputs, merged against unmerged.
        orthogonality_error: ‖RᵀR − I‖₂ of the worst factor folded in.
        rounding_error: Distance of the stored weight from the exactly folded one.
        untied: Whether the weight was tied and got a tensor of its own.
        survived: Of a requantised weight, the share of the adaptation that is still there:
            ``⟨V − W, F − W⟩ / ‖F − W‖²`` with W the weight before, F the exactly folded one and V
            the stored one, all as floats. 1 when nothing was rounded away, 0 when everything was;
            rounding may push it beyond either. NaN where nothing was adapted, F = W.
    """

    fqn: str
    output_error: float
    orthogonality_error: float
    rounding_error: float
    untied: bool = False
    survived: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """What merging cost, per site; ``str()`` is a table."""

    sites: tuple[MergedSite, ...]

    def __str__(self) -> str:
        requantised = any(site.survived is not None for site in self.sites)
        rows = [
            (
                site.fqn,
                f"{site.output_error:.1e}",
                f"{site.orthogonality_error:.1e}",
                f"{site.rounding_error:.1e}",
                *([] if not requantised else [_percent(site.survived)]),
                "untied" if site.untied else "",
            )
            for site in self.sites
        ]
        survived = ["survived"] if requantised else []
        header = ("site", "output", "orthogonality", "rounding", *survived, "")
        return table(header, rows, right="output orthogonality rounding survived")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


@overload
def merge(
    model: M,
    report: Literal[False] = False,
    *,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
) -> M: ...
@overload
def merge(
    model: M,
    report: Literal[True],
    *,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
) -> tuple[M, MergeReport]: ...
def merge(
    model: M,
    report: bool = False,
    *,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
) -> M | tuple[M, MergeReport]:
    """Folds every adapter into the weights and gives a plain model back.

    A tied weight that only one of its users rotates gets a tensor of its own; a transformers model
    then forgets the tie in its config, so that saving keeps both.

    A model with rotated quantised layers becomes an ordinary float one: each quantised layer,
    adapted or not, becomes an `nn.Linear`, and a transformers model forgets its quantisation. One
    layer at a time is held in float32.

    Args:
        model: An adapted nn.Module or GraphModule, merged in place; or an ExportedProgram, of
            which a merged copy is returned.
        report: Also measure what it cost.
        dtype: Of a model with quantised layers: the dtype of all its parameters afterwards;
            bfloat16 for None. A float model keeps the dtypes it has.
        requantize: Store what was folded in the format its layer has now. Rounding takes part of
            the adaptation away again, all of it where the rotations are small; the report says how
            much survived.

    Raises:
        MergeError: There is nothing to merge, or a weight or rotation cannot be folded (on
            `meta`, not finite, of a library that cannot dequantise), or ``dtype`` or
            ``requantize`` do not fit the model. The model is untouched.

    Warns:
        OftfxWarning: Requantising rounded most of the adaptation away.
    """
    inner = unwrap(model)
    try:
        parameters(inner)
    except PlanError as error:
        raise MergeError(f"nothing to merge: {error}") from error
    merged: Any
    if isinstance(inner, (fx.GraphModule, ExportedProgram)):
        if dtype is not None or requantize:
            raise MergeError("dtype and requantize are for an nn.Module with quantised layers.")
        merged, costs = _merge_graph(inner, report)
    else:
        merged, costs = _merge_module(inner, report, dtype, requantize)
    result = merged if isinstance(model, ExportedProgram) else model
    return (result, MergeReport(tuple(costs))) if report else result


@dataclass(frozen=True)
class _Fold:
    """One weight to fold: the factors in the order x meets them."""

    fqn: str
    weight: Tensor
    out_in: bool
    factors: Sequence[Factor]
    dtype: torch.dtype
    """What the folded weight is stored in."""

    def check(self) -> None:
        if self.weight.device.type == "meta":
            raise MergeError(
                f"{self.fqn}: its weight is on `meta` (not loaded, or offloaded); load the whole "
                "model onto a device before merging."
            )
        if not self.weight.is_floating_point():
            raise MergeError(
                f"{self.fqn}: its weight is quantised, which this version folds in an nn.Module "
                "only: merge that and export it anew, or keep the rotation in the graph."
            )
        if not all(torch.isfinite(tensor).all() for tensor in self._tensors()):
            raise MergeError(f"{self.fqn}: its rotation is not finite; training diverged there.")

    def folded(self, dtype: torch.dtype) -> Tensor:
        """``W Mᵀ`` in (out, in), computed in this dtype."""
        rows = (self.weight if self.out_in else self.weight.mT).to(dtype)
        for factor in reversed(self.factors):
            rows = factor.transposed()(rows)
        return rows

    def run(self) -> Tensor:
        """The weight to store, in its own layout and dtype."""
        rows = self.folded(torch.promote_types(self._wide(), self.dtype))
        return (rows if self.out_in else rows.mT).to(self.dtype).contiguous()

    def survived(self, stored: Tensor) -> float:
        """The share of the adaptation that a stored weight kept, as `MergedSite` defines it."""
        exact = self.folded(self._wide())
        change = exact - self.weight
        return float(((stored - self.weight) * change).sum() / change.square().sum())

    def cost(
        self, stored: Tensor, untied: bool = False, survived: float | None = None
    ) -> MergedSite:
        exact = self.folded(torch.float64)
        out_in = self.out_in
        before, after = (w if out_in else w.mT for w in (self.weight, stored))
        seed = torch.Generator().manual_seed(0)
        x = torch.randn(16, before.shape[1], generator=seed).to(before)
        rotated = x
        for factor in self.factors:
            rotated = factor(rotated)
        unmerged = (rotated @ before.mT).double()
        return MergedSite(
            self.fqn,
            output_error=_relative((x @ after.to(x.dtype).mT).double() - unmerged, unmerged),
            orthogonality_error=max(float(factor.defect()) for factor in self.factors),
            rounding_error=_relative(after.double() - exact, exact),
            untied=untied,
            survived=survived,
        )

    def _wide(self) -> torch.dtype:
        """The widest of the weight's dtype and the factors'."""
        dtypes = (tensor.dtype for tensor in self._tensors())
        return functools.reduce(torch.promote_types, dtypes, self.weight.dtype)

    def _tensors(self) -> Iterator[Tensor]:
        for factor in self.factors:
            yield from (operand for operand in factor.operands if isinstance(operand, Tensor))


def _relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.norm() / reference.norm().clamp_min(1e-300))


@dataclass(frozen=True)
class _Site:
    """One adapted weight of a module; its fold is made when it is wanted, one at a time."""

    fqn: str
    module: nn.Module
    name: str
    layout: str
    rotations: list[Rotation | SharedRotation]
    quantiser: Quantiser | None = None

    def fold(self, dtype: torch.dtype = torch.bfloat16) -> _Fold:
        """Its fold; ``dtype`` is for a quantised weight, a float one keeps its own."""
        factors = [factor for rotation in self.rotations for factor in rotation.factors()]
        if self.quantiser is not None:
            weight = _dequantised(self.fqn, self.module, self.quantiser)
            return _Fold(self.fqn, weight, True, factors, dtype)
        kept = self.module._parameters[self.name]
        assert kept is not None
        return _Fold(self.fqn, kept, self.layout == "out_in", factors, kept.dtype)

    def replace(self, value: Tensor) -> None:
        weight = self.module._parameters[self.name]
        assert weight is not None
        self.module._parameters[self.name] = nn.Parameter(value, weight.requires_grad)


@torch.no_grad()
def _merge_module(
    model: nn.Module, report: bool, dtype: torch.dtype | None, requantize: bool
) -> tuple[nn.Module, list[MergedSite]]:
    quantised = list(_quantised(model))
    _check_options(bool(quantised), dtype, requantize)
    found = list(_module_sites(model))
    rotated = any(site.quantiser is not None for site in found)
    to_floats = not requantize and (dtype is not None or rotated)
    dtype = dtype or torch.bfloat16
    for site in found:
        if requantize and site.quantiser is not None and not site.quantiser.REQUANTISES:
            raise MergeError(
                f"{site.fqn}: {site.quantiser.KIND} layers are not quantised anew here: merge to "
                "floats, oftfx.merge(model), and quantise the result with its own library."
            )
        site.fold().check()
    if to_floats:
        for fqn, module, quantiser in quantised:
            _dequantised(fqn, module, quantiser)
    names = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    costs, any_untied = [], False
    for site in found:
        if site.quantiser is not None:
            cost = _store_quantised(site, site.quantiser, report, dtype, requantize)
        else:
            cost, untied = _store(site, names, report)
            any_untied |= untied
        if cost is not None:
            costs.append(cost)
    detach(model)
    if any_untied:
        _forget_tie(model)
    if requantize:
        _warn_of_loss(costs)
    if to_floats:
        _finish_floats(model, dtype)
    return model, costs


def _store(site: _Site, names: Counter[int], report: bool) -> tuple[MergedSite | None, bool]:
    """Folds one float weight: in place, or into a tensor of its own where it is tied."""
    fold = site.fold()
    stored = fold.run()
    untied = names[id(fold.weight)] > 1
    cost = fold.cost(stored, untied) if report else None
    if untied:
        names[id(fold.weight)] -= 1
        site.replace(stored)
    else:
        fold.weight.copy_(stored)
    return cost, untied


def _store_quantised(
    site: _Site, quantiser: Quantiser, report: bool, dtype: torch.dtype, requantize: bool
) -> MergedSite | None:
    """Folds one quantised weight; its floats are gone when this returns."""
    fold = site.fold(dtype)
    if requantize:
        quantiser.requantise(site.module, fold.folded(torch.float32))
        stored = quantiser.dequantise(site.module)
        return fold.cost(stored, survived=fold.survived(stored))
    stored = fold.run()
    assert isinstance(site.module, Adapted)
    bare(site.module)
    to_linear(site.module, stored)
    return fold.cost(stored) if report else None


def _check_options(quantised: bool, dtype: torch.dtype | None, requantize: bool) -> None:
    if (dtype is not None or requantize) and not quantised:
        raise MergeError("dtype and requantize are for quantised layers, and the model has none.")
    if dtype is None:
        return
    if requantize:
        raise MergeError("requantize=True keeps the format that each layer has: leave dtype out.")
    if not (dtype.is_floating_point and dtype.itemsize > 1):
        raise MergeError(f"dtype={dtype}: must be a floating dtype of ≥ 16 bits.")


def _quantised(model: nn.Module) -> Iterator[tuple[str, nn.Module, Quantiser]]:
    for fqn, module in model.named_modules():
        if (quantiser := sites.quantiser_of(module)) is not None:
            yield fqn, module, quantiser


def _dequantised(fqn: str, module: nn.Module, quantiser: Quantiser) -> Tensor:
    """A quantised layer's weight as floats.

    Raises:
        MergeError: Its library cannot make one, or what it holds is damaged.
    """
    fault = quantiser.fault(module)
    if not fault and device_of(module).type == "meta":
        fault = "its weight is on `meta`; load the whole model onto a device before merging"
    if fault:
        raise MergeError(f"{fqn}: {fault}.")
    try:
        weight = quantiser.dequantise(module)
    except MergeError as error:
        raise MergeError(f"{fqn}: {error}") from error
    if not torch.isfinite(weight).all():
        raise MergeError(f"{fqn}: its quantised weight is not finite; its quant state is damaged.")
    return weight


def _finish_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """Turns what is still quantised to floats and gives all parameters one dtype."""
    for _, module, quantiser in list(_quantised(model)):
        to_linear(module, quantiser.dequantise(module).to(dtype))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    pretrained.forget_quantisation(model)


def _warn_of_loss(costs: list[MergedSite]) -> None:
    lost = [site for site in costs if site.survived is not None and site.survived < 0.5]
    if lost:
        worst = min(lost, key=lambda site: site.survived or 0.0)
        warnings.warn(
            f"requantising rounded most of the adaptation away at {len(lost)} of {len(costs)} "
            f"sites ({worst.fqn}: {_percent(worst.survived)} is left). The merged model is close "
            "to the base; keep the adapter beside it, or merge to floats: oftfx.merge(model).",
            OftfxWarning,
            stacklevel=4,
        )


def _module_sites(model: nn.Module) -> Iterator[_Site]:
    for fqn, module in model.named_modules():
        if not isinstance(module, Adapted):
            continue
        layouts = dict(module.oft_shadowed)
        if not layouts:
            provider = sites.provider_of(module)
            assert provider is not None
            layouts = {"weight": provider.LAYOUT}
        quantiser = sites.quantiser_of(module)
        for name, layout in layouts.items():
            held: list[Any] = [
                rotation[name] if isinstance(rotation, nn.ModuleDict) else rotation
                for rotation in module.oft.values()
                if not isinstance(rotation, nn.ModuleDict) or name in rotation
            ]
            yield _Site(site_name(fqn, name), module, name, layout, held, quantiser)


def _forget_tie(model: nn.Module) -> None:
    """A transformers config that still says the embeddings are tied would tie them on loading."""
    embeddings = [
        getattr(getattr(model, name)(), "weight", None)
        for name in ("get_input_embeddings", "get_output_embeddings")
        if hasattr(model, name)
    ]
    config: Any = getattr(model, "config", None)
    if len(embeddings) == 2 and embeddings[0] is not embeddings[1] and config is not None:
        for part in (config, config.get_text_config()):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


@torch.no_grad()
def _merge_graph(
    model: fx.GraphModule | ExportedProgram, report: bool
) -> tuple[fx.GraphModule | ExportedProgram, list[MergedSite]]:
    host = host_of(model, edit=True)
    rotations = {found.node: found for found in insert.inserted(host)}
    graph = read(host)
    uses = match.uses(graph)
    chains = [_chains(host, use, graph.aliases[use.weight], rotations) for use in uses]
    turning = {node for through_x, _ in chains for node in through_x}
    for node in turning:
        if others := _users(node) - {use.node for use in uses} - turning:
            raise MergeError(f"{rotations[node].site}: {others.pop()} reads what it rotates, too.")
    for node in rotations.keys() - turning - {n for _, through_w in chains for n in through_w}:
        raise MergeError(f"{rotations[node].site}: no weight was found behind its rotation.")

    folds: dict[str, _Fold] = {}
    turned: dict[str, list[tuple[str, ...]]] = {}
    for use, (through_x, through_w) in zip(uses, chains, strict=True):
        name = use.weight
        by = [rotations[node].parameters for node in (*through_x, *through_w)]
        if turned.setdefault(name, by) != by:
            raise MergeError(f"{name} is read rotated in different ways; it cannot be folded.")
        if by and name not in folds:
            factors = [insert.evaluate(host, rotations[node]) for node in through_x]
            factors += [insert.evaluate(host, rotations[node]).transposed() for node in through_w]
            out_in = use.layout == "out_in"
            if through_w:
                out_in = not parameter_behind(rotations[through_w[0]].x)[1]
            fqn = name.removesuffix(".weight")
            weight = host.parameters()[name]
            folds[name] = _Fold(fqn, weight, out_in, factors, weight.dtype)
    for fold in folds.values():
        fold.check()

    for use in uses:
        if not folds.keys().isdisjoint(graph.aliases[use.weight]):
            _read_own_name(host, use, graph.aliases[use.weight])
    costs = []
    for name, fold in folds.items():
        stored = fold.run()
        if report:
            costs.append(fold.cost(stored, untied=len(graph.aliases[name]) > 1))
        requires_grad = host.parameters()[name].requires_grad
        host.set(name, nn.Parameter(stored, requires_grad=requires_grad))
    return remove(host.finish()), costs


def _chains(
    host: Host, use: match.Use, aliases: tuple[str, ...], rotations: dict[fx.Node, insert.Inserted]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The rotations a matmul's input went through and those its weight did, as x meets them.

    The last rotation of a weight is the first of x.
    """
    readers = host.readers()
    reads = [n for n in use.node.all_input_nodes if readers.get(parameter_behind(n)[0]) in aliases]
    through_x = [] if use.x is None else [n for n in _path(use.x) if n in rotations]
    through_w = [n for read in reads for n in _path(read) if n in rotations]
    return through_x[::-1], through_w


def _path(node: fx.Node) -> list[fx.Node]:
    """The casts, views and rotations between a node and where it comes from, and the latter."""
    path = [node]
    while is_view_of_weight(path[-1]) or tensor_behind(path[-1]) is not path[-1]:
        path.append(path[-1].all_input_nodes[0])
    return path


def _users(node: fx.Node) -> set[fx.Node]:
    """What reads a node, directly or through casts and views."""
    users = set()
    for user in node.users:
        users |= _users(user) if tensor_behind(user) is not user else {user}
    return users


def _read_own_name(host: Host, use: match.Use, aliases: tuple[str, ...]) -> None:
    """Lets a node read a tied weight under its owner's name; tracers use one name for all."""
    readers, graph = host.readers(), host.module.graph
    for given in use.node.all_input_nodes:
        *path, start = _path(given)
        if use.weight == readers.get(start, use.weight) or readers[start] not in aliases:
            continue
        own = next((node for node, name in readers.items() if name == use.weight), None)
        if own is None:  # nothing read it by this name so far
            own = host.add(use.weight, host.parameters()[use.weight])
        moved = {start: own}
        for node in reversed(path):
            with graph.inserting_before(use.node):
                moved[node] = graph.node_copy(node, _looked_up(moved))
        use.node.replace_input_with(given, moved[given])


def _looked_up(moved: dict[fx.Node, fx.Node]) -> Callable[[fx.Node], fx.Node]:
    return lambda node: moved.get(node, node)
