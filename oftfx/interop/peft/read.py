"""From a PEFT directory to a plan and its rotations' tensors."""

import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oftfx.capture import Model
from oftfx.errors import CaptureError, CheckpointError, OftfxError, OftfxWarning
from oftfx.fingerprint import Fingerprint
from oftfx.host import parameters_of
from oftfx.interop.peft.copied import read_copied, rules
from oftfx.interop.peft.directory import COMMON, CONFIG, TENSORS, Directory, read_directory
from oftfx.interop.peft.formats import FORMATS, Format
from oftfx.plan import Plan, plan
from oftfx.rotations import method_of, output_shapes
from oftfx.sites.embedding import KIND as EMBEDDING
from oftfx.spec import Spec
from oftfx.spec.rules import exactly
from oftfx.table import listed
from oftfx.weights import Weights


def read(model: Model, path: Path) -> tuple[Plan, dict[str, Tensor]]:
    """Reads a directory for a base model, which it does not touch.

    Args:
        model: The base, in any of the three forms.
        path: What PEFT's ``save_pretrained`` wrote, from 0.16 on.

    Returns:
        The plan, and the adapter's tensors, as [`save`][oftfx.save] names them.

    Raises:
        CheckpointError: The directory is damaged, of a method or variant that no spec stands for,
            or belongs to another base.

    Warns:
        OftfxWarning: Its config says what a spec has no word for, or asks for what this version
            does not know.
    """
    found = read_directory(path)
    if found.method not in FORMATS:
        raise CheckpointError(
            f"{path / CONFIG}: peft_type {found.method!r} is not read; this version reads "
            f"{', '.join(FORMATS)}."
        )
    form = FORMATS[found.method]
    _warn_of_unknown(found, form)
    layers, embedded, rest = _layers(found, form)
    specs = _specs(found, form, layers)
    _check_base(model, found, layers)
    _warn_of_missing(model, found, layers)
    values = read_copied(found, rest, layers, model)
    try:
        chosen = _planned(model, _together(specs, rules(values)))
    except OftfxError as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from error
    if odd := {site.fqn for site in chosen.sites if site.kind == EMBEDDING} ^ embedded:
        raise CheckpointError(f"{path / TENSORS}: {min(odd)} is an embedding there or here alone.")
    weights = Weights(model)
    for site in chosen.sites:
        spec = chosen.spec_of(site)
        weight = partial(weights.stacked, [site])
        try:
            converted = form.ours(found, spec, layers[site.fqn], weight)
        except KeyError as error:
            raise CheckpointError(f"{path / TENSORS}: {site.fqn} lacks {error}.") from error
        shapes = method_of(spec).shapes(spec, site.in_features)
        for name, shape in {**shapes, **output_shapes(spec, site.out_features)}.items():
            if tuple(converted[name].shape) != shape:
                raise CheckpointError(
                    f"{path / TENSORS}: the tensors of {site.fqn} make a {name} of shape "
                    f"{tuple(converted[name].shape)}; its config and this base need {shape}."
                )
            values[f"{site.fqn}.{name}"] = converted[name]
    return chosen, values


def _warn_of_unknown(found: Directory, form: Format) -> None:
    """Tells of fields that a later PEFT has added and that ask for something."""
    known = COMMON | form.FIELDS
    asked = [f"{k}={v!r}" for k, v in sorted(found.config.items()) if k not in known and v]
    if asked:
        warnings.warn(
            f"{found.path / CONFIG}: {', '.join(asked)} is of a later PEFT than this version of "
            "oftfx knows, and is not heeded: compare the outputs with PEFT's.",
            OftfxWarning,
            stacklevel=2,
        )


def _warn_of_missing(model: Model, found: Directory, layers: Collection[str]) -> None:
    """Tells of the base's layers that the config names, and of which the file has no tensor."""
    named = found.config.get("target_modules")
    narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
    if not isinstance(named, list) or any(found.config.get(field) for field in narrowing):
        return  # names that a regex makes, or that hold for a part of the layers
    endings = tuple(f".{name}" for name in named)
    owners = dict.fromkeys(name.rpartition(".")[0] for name in parameters_of(model))
    missing = [fqn for fqn in owners if f".{fqn}".endswith(endings) and fqn not in layers]
    if missing:
        warnings.warn(
            f"{found.path / TENSORS} has no tensor of {listed(missing)}, which target_modules in "
            f"{CONFIG} names: these layers stay as they are in the base.",
            OftfxWarning,
            stacklevel=2,
        )


def _planned(model: Model, spec: Spec) -> Plan:
    try:
        return plan(model, spec)
    except CaptureError:  # the names of layers are all that PEFT goes by
        return plan(model, spec, capture="modules")


def _layers(
    found: Directory, form: Format
) -> tuple[dict[str, dict[str, Tensor]], set[str], dict[str, Tensor]]:
    """Each layer's tensors by suffix, which are embeddings, and the tensors of no rotation.

    Raises:
        CheckpointError: There is no rotation; or a tensor is damaged.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    embedded, rest = set(), {}
    file = found.path / TENSORS
    endings = {s: s for s in form.SUFFIXES} | {e: s for s, e in form.EMBEDDED.items()}
    for key, tensor in found.tensors.items():
        ending = next((e for e in endings if key.endswith(f".{e}")), None)
        if ending is None:
            rest[key] = tensor
        else:
            fqn = key.removesuffix(f".{ending}")
            layers.setdefault(fqn, {})[endings[ending]] = tensor
            if ending not in form.SUFFIXES:
                embedded.add(fqn)
        if not (tensor.is_floating_point() and tensor.itemsize > 1):
            raise CheckpointError(
                f"{file}: {key} is {tensor.dtype}, not floating point of 16 bits or more."
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file}: {key} holds numbers that are not finite.")
    if not layers:
        listed = ", ".join(sorted(rest)[:3])
        raise CheckpointError(f"{file} holds no tensor of {found.method}, but {listed or 'none'}.")
    return layers, embedded, rest


def _specs(
    found: Directory, form: Format, layers: Mapping[str, Mapping[str, Tensor]]
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


def _together(specs: Mapping[str, Spec], also_train: tuple[str, ...]) -> Spec:
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
            overrides[exactly(fqn)] = changed
    targets = tuple(map(exactly, specs))
    return replace(usual, targets=targets, overrides=overrides, also_train=also_train)


def _check_base(model: Model, found: Directory, layers: Mapping[str, Any]) -> None:
    weights = Fingerprint(model)
    for fqn in layers:
        if weights.shape(f"{fqn}.weight") is None:
            raise CheckpointError(
                f"{found.path} was trained on another base: this one has no {fqn}.weight."
            )
