"""Merging an nn.Module: its layers get their folded weights and their own classes back."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from oftfx import bank, copied, sites
from oftfx.attach import detach
from oftfx.errors import MergeError
from oftfx.fold.cost import Cost, cost, settled
from oftfx.fold.options import Options
from oftfx.fold.report import MergedSite, warn_of_loss
from oftfx.fold.weight import Fold, check_finite
from oftfx.modules import RECORD, Adapted, State, bare, ordered, site_name
from oftfx.progress import tracked
from oftfx.sites import pretrained
from oftfx.sites.quantised import Quantiser, device_of, to_linear


@dataclass(frozen=True)
class _Site:
    """One adapted weight of a module; a quantised one's fold is made when it is wanted."""

    fqn: str
    module: nn.Module
    name: str
    layout: str
    rotations: list[State]
    quantiser: Quantiser | None = None

    def fold(self, dtype: torch.dtype = torch.bfloat16) -> Fold:
        """Its fold; ``dtype`` is for a quantised weight, a float one keeps its own."""
        factors = [factor for rotation in self.rotations for factor in rotation.factors()]
        if sites.is_embedding(self.module):  # its rows fold as W·M
            factors = [factor.transposed() for factor in reversed(factors)]
        scales = [scale for rotation in self.rotations for scale in rotation.scales()]
        if self.quantiser is not None:
            weight = _dequantised(self.fqn, self.module, self.quantiser)
            return Fold(self.fqn, weight, True, factors, dtype, scales)
        kept = self.module._parameters[self.name]
        assert kept is not None
        return Fold(self.fqn, kept, self.layout == "out_in", factors, kept.dtype, scales)

    def replace(self, value: Tensor) -> None:
        weight = self.module._parameters[self.name]
        assert weight is not None
        folded = nn.Parameter(value, weight.requires_grad)
        folded.__dict__.update(weight.__dict__)  # what libraries note on a parameter
        self.module._parameters[self.name] = folded


@torch.no_grad()
def merge_module(
    model: nn.Module, report: bool, options: Options
) -> tuple[nn.Module, list[MergedSite]]:
    """Folds every rotation of a module into its weight; one layer's floats at a time.

    The weights are folded one after the other without waiting for the device in between. A folded
    weight is a tensor of its own, since others may read the old one: layers that are tied to it, a
    graph that was exported. A layer takes its weights and loses its rotations at once, so that
    whatever stops a merge leaves a model that computes what it did, and that can be merged again.

    Raises:
        MergeError: The options do not fit, or a weight cannot be folded. The model is untouched.
    """
    found = list(_module_sites(model))
    _check_whole(model, found)
    adapted = any(site.quantiser is not None for site in found)
    # Of a float model with floats to fold, none of the many other modules has to be asked.
    quantised = list(_quantised(model)) if adapted or options != Options() else []
    options.check(bool(quantised))
    to_floats = options.to_floats(adapted)
    dtype, requantize = options.floats, options.requantize
    for site in found:
        if requantize and site.quantiser is not None and not site.quantiser.REQUANTISES:
            raise MergeError(
                f"{site.fqn}: {site.quantiser.KIND} layers are not quantised anew here: merge to "
                "floats, oftfx.merge(model), and quantise the result with its own library."
            )
    bank.build(dict.fromkeys(state.rotation for site in found for state in site.rotations))
    folds, turned = zip(*map(_checked, found), strict=True)
    names = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    check_finite(turned)
    if to_floats:
        for fqn, module, quantiser in quantised:
            _dequantised(fqn, module, quantiser)
    measured: list[Cost | None] = []
    any_untied = False
    pairs = zip(found, folds, strict=True)
    layers = [list(group) for _, group in groupby(pairs, lambda pair: id(pair[0].module))]
    del folds, pairs
    for layer in tracked(layers, "folding"):
        site = layer[0][0]
        if site.quantiser is not None:
            measured.append(_store_quantised(site, site.quantiser, report, dtype, requantize))
            continue
        untied = [names[id(fold.weight)] > 1 for _, fold in layer]
        names.subtract(id(fold.weight) for _, fold in layer)
        # What is tied to an embedding may lie outside of the part that is merged.
        any_untied |= any(untied) or sites.is_embedding(site.module)
        measured += _store(layer, untied, report)
        layer.clear()  # and with it its old weights
    costs = settled([each for each in measured if each is not None])
    any_untied |= any(copies.own and copies.in_place for _, _, copies in copied.of(model))
    detach(model, merged=True)
    if any_untied:
        for each in pretrained.models_in(model):
            _forget_tie(each)
    if requantize:
        warn_of_loss(costs)
    if to_floats:
        _finish_floats(model, dtype)
    return model, costs


def _check_whole(model: nn.Module, found: list[_Site]) -> None:
    """Every site was adapted as a part of this model or of a module within it.

    Raises:
        MergeError: The model is itself a part of what was adapted.
    """
    parts = [module for module in model.modules() if RECORD in vars(module)]
    inside = {id(module) for part in parts for module in part.modules()}
    for site in found:
        if id(site.module) not in inside:
            raise MergeError(
                f"{site.fqn} was adapted as a part of a larger module than this "
                f"{type(model).__name__}: merge that one."
            )


def _checked(site: _Site) -> tuple[Fold | None, tuple[str, list[Tensor]]]:
    """A float weight's fold, None for a quantised one; and what its factors are made of."""
    fold = site.fold()
    fold.check()
    return None if site.quantiser else fold, (site.fqn, fold.tensors())


def _store(
    layer: Sequence[tuple[_Site, Fold]], untied: Sequence[bool], report: bool
) -> list[Cost | None]:
    """Gives one layer its folded float weights and its own class."""
    stored = [fold.run() for _, fold in layer]
    measured = [
        cost(fold, value, alone) if report else None
        for (_, fold), value, alone in zip(layer, stored, untied, strict=True)
    ]
    module = layer[0][0].module
    assert isinstance(module, Adapted)
    for (site, _), value in zip(layer, stored, strict=True):
        site.replace(value)
    bare(module)
    return measured


def _store_quantised(
    site: _Site, quantiser: Quantiser, report: bool, dtype: torch.dtype, requantize: bool
) -> Cost | None:
    """Folds one quantised weight; its floats are gone when this returns."""
    fold = site.fold(dtype)
    assert isinstance(site.module, Adapted)
    if requantize:
        quantiser.requantise(site.module, fold.folded(torch.float32))
        bare(site.module)
        stored = quantiser.dequantise(site.module)
        return cost(fold, stored, requantised=True)
    stored = fold.run()
    bare(site.module)
    to_linear(site.module, stored)
    return cost(fold, stored) if report else None


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
    for each in pretrained.models_in(model):
        pretrained.forget_quantisation(each)


def _module_sites(model: nn.Module) -> Iterator[_Site]:
    for fqn, module in model.named_modules():
        if not isinstance(module, Adapted):
            continue
        layouts, provider = dict(module.oft_shadowed), sites.provider_of(module)
        if not layouts and sites.is_embedding(module):
            layouts = {"weight": "out_in"}
        if not layouts:
            assert provider is not None
            layouts = {"weight": provider.LAYOUT}
        quantiser = sites.as_quantiser(provider)
        for name, layout in layouts.items():
            held: list[Any] = [
                rotation[name] if isinstance(rotation, nn.ModuleDict) else rotation
                for rotation in ordered(module)
                if not isinstance(rotation, nn.ModuleDict) or name in rotation
            ]
            if not (held := [rotation for rotation in held if rotation.enabled]):
                continue  # its adapters are not in use
            yield _Site(site_name(fqn, name), module, name, layout, held, quantiser)


def _forget_tie(model: Any) -> None:
    """A transformers config that still says the embeddings are tied would tie them on loading."""
    embeddings = [
        getattr(embedding, "weight", None)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    if embeddings[0] is embeddings[1]:
        return
    for part in (model.config, model.config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
