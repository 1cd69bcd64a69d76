"""From a PEFT directory to a plan and its rotations' tensors."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from oftfx.capture import Model
from oftfx.errors import CheckpointError, OftfxError
from oftfx.fingerprint import Fingerprint
from oftfx.interop.peft.directory import CONFIG, TENSORS, Directory, read_directory
from oftfx.interop.peft.formats import READS, Readable
from oftfx.plan import Plan, plan
from oftfx.rotations import method_of
from oftfx.spec import Spec
from oftfx.weights import Weights


def read(model: Model, path: Path) -> tuple[Plan, dict[str, Tensor]]:
    """Reads a directory for a base model, which it does not touch.

    Args:
        model: The base, in any of the three forms.
        path: What PEFT's ``save_pretrained`` wrote, from 0.18 on.

    Returns:
        The plan, and the rotations' tensors by site, as [`save`][oftfx.save] names them.

    Raises:
        CheckpointError: The directory is damaged, of a method or variant that no spec stands for,
            or belongs to another base.
    """
    found = read_directory(path)
    if found.method not in READS:
        raise CheckpointError(
            f"{path / CONFIG}: peft_type {found.method!r} is not read; this version reads "
            f"{', '.join(READS)}."
        )
    form = READS[found.method]
    layers = _layers(found, form)
    specs = _specs(found, form, layers)
    _check_base(model, found, layers)
    try:
        chosen = plan(model, _together(specs))
    except OftfxError as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from error
    weights = Weights(model)
    values = {}
    for site in chosen.sites:
        spec = chosen.spec_of(site)
        weight = partial(weights.stacked, [site])
        converted = form.ours(found, spec, layers[site.fqn], weight)
        for name, shape in method_of(spec).shapes(spec, site.in_features).items():
            if tuple(converted[name].shape) != shape:
                raise CheckpointError(
                    f"{path / TENSORS}: the tensors of {site.fqn} make a {name} of shape "
                    f"{tuple(converted[name].shape)}; its config and this base need {shape}."
                )
            values[f"{site.fqn}.{name}"] = converted[name]
    return chosen, values


def _layers(found: Directory, form: Readable) -> dict[str, dict[str, Tensor]]:
    """Each layer's tensors by suffix.

    Raises:
        CheckpointError: A tensor that is no rotation's, or one that is missing.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in found.tensors.items():
        suffix = next((s for s in form.SUFFIXES if key.endswith(f".{s}")), None)
        if suffix is None:
            foreign.append(key)
        else:
            layers.setdefault(key.removesuffix(f".{suffix}"), {})[suffix] = tensor
    file = found.path / TENSORS
    if foreign:
        raise CheckpointError(
            f"{file} holds more than rotations of linear layers, which this version does not "
            f"load: {', '.join(sorted(foreign))}."
        )
    if not layers:
        raise CheckpointError(f"{file} holds no tensor of {found.method}.")
    return layers


def _specs(
    found: Directory, form: Readable, layers: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Spec]:
    """The spec of each layer."""
    common = form.fields(found)
    cls = common.pop("method")
    out = {}
    for fqn, tensors in layers.items():
        try:
            at = form.fields_at(found, tensors)
            dtype = min((t.dtype for t in tensors.values()), key=lambda d: d.itemsize)
            out[fqn] = cls(**common, **at, dtype=dtype)
        except OftfxError as error:
            raise CheckpointError(f"{found.path}, layer {fqn}: {error}") from error
        except KeyError as error:
            raise CheckpointError(f"{found.path / TENSORS}: {fqn} lacks {error}.") from error
    return out


def _together(specs: Mapping[str, Spec]) -> Spec:
    """One spec for all layers: the most frequent, and overrides where one differs."""
    usual = Counter(specs.values()).most_common(1)[0][0]
    overrides: dict[str, dict[str, Any]] = {}
    for fqn, spec in specs.items():
        changed = {
            field.name: getattr(spec, field.name)
            for field in fields(spec)
            if getattr(spec, field.name) != getattr(usual, field.name)
        }
        if changed:
            overrides[re.escape(fqn)] = changed
    return replace(usual, targets=tuple(map(re.escape, specs)), overrides=overrides)


def _check_base(model: Model, found: Directory, layers: Mapping[str, Any]) -> None:
    weights = Fingerprint(model)
    for fqn in layers:
        if weights.shape(f"{fqn}.weight") is None:
            raise CheckpointError(
                f"{found.path} was trained on another base: this one has no {fqn}.weight."
            )
