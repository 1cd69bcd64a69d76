"""Adapters on disk: safetensors and JSON, no pickle.

    adapter/
      adapter.safetensors   a rotation's tensors, by site
      adapter.json          spec, plan, versions, a fingerprint of the base, and checksums

Each file is written under a temporary name and renamed; the JSON comes last and holds the other's
checksum, so a torn or mixed pair is noticed.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from oftfx import insert, modules
from oftfx.adapter import put
from oftfx.attach import record_holder
from oftfx.capture import Model, unwrap
from oftfx.errors import CheckpointError, OftfxError, PlanError
from oftfx.fingerprint import Fingerprint
from oftfx.host import parameters_of
from oftfx.plan import Plan, Site
from oftfx.rotations import method_of, output_shapes
from oftfx.sites import is_quantised

M = TypeVar("M", nn.Module, ExportedProgram)

FORMAT = 1
TENSORS, MANIFEST = "adapter.safetensors", "adapter.json"


def save(model: Model, directory: str | os.PathLike[str], name: str = "default") -> None:
    """Writes one adapter of a model.

    Args:
        model: An adapted nn.Module, GraphModule or ExportedProgram.
        directory: Made if missing; an adapter in it is replaced.
        name: Which adapter.

    Raises:
        PlanError: The model has no such adapter.
        CheckpointError: The directory cannot be written.
    """
    from safetensors.torch import save as serialise

    inner = unwrap(model)
    plan = _plan(inner, name)
    values = _values(inner, plan, name)
    payload = serialise({key: value.detach().cpu().contiguous() for key, value in values.items()})
    from oftfx import __version__

    manifest: dict[str, Any] = {
        "format": FORMAT,
        "oftfx": __version__,
        "torch": torch.__version__,
        "plan": json.loads(plan.to_json()),
        "base": _fingerprint(inner, plan),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    manifest["checksum"] = _checksum(manifest)
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        before = (path / TENSORS).read_bytes() if (path / TENSORS).is_file() else None
        _write(path / TENSORS, payload)
        try:
            _write(path / MANIFEST, json.dumps(manifest, indent=1).encode())
        except OSError:
            if before is not None:  # the adapter that was here stays whole
                _write(path / TENSORS, before)
            raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}.") from error


def load(model: M, directory: str | os.PathLike[str], name: str = "default") -> M:
    """Adapts a base model with an adapter that [`save`][oftfx.save] wrote.

    Args:
        model: The base, in any of the three forms.
        directory: What ``save`` wrote.
        name: The name the adapter gets in this model.

    Returns:
        The adapted model, as [`adapt`][oftfx.adapt] does.

    Raises:
        CheckpointError: The directory is damaged, foreign, or belongs to another base. Says which
            part; the model is untouched.
        PlanError: The model has an adapter of this name already.
    """
    inner = unwrap(model)
    plan, values, base = _read(Path(directory))
    _check_base(inner, plan, base, Path(directory))
    taken = any(modules.is_rotation(key, name) for key in parameters_of(inner))
    try:
        # What is never trained comes from the file too: no weight is decomposed, no batch run.
        adapted = put(model, plan, name, fixed=dict)
    except PlanError as error:
        if taken:
            raise
        raise CheckpointError(f"{directory} does not fit this model: {error}") from error
    with torch.no_grad():
        for key, parameter in _values(unwrap(adapted), plan, name).items():
            parameter.copy_(values[key])
    return adapted


def _plan(model: Model, name: str) -> Plan:
    if isinstance(model, (fx.GraphModule, ExportedProgram)):
        records = insert.records(model)
        if name not in records:
            raise PlanError(f"the graph has no adapter {name!r}; it has {sorted(records)}.")
        return Plan.from_json(records[name]["plan"])
    return record_holder(model, name)[name].plan


def _values(model: Model, plan: Plan, name: str) -> dict[str, Tensor]:
    """The adapter's tensors, those that are never trained included, by site."""
    held = parameters_of(model)
    values: dict[str, Tensor] = {}
    for site in plan.sites:
        path = modules.parameter_path(site.weight, name, site.kind == "functional")
        for tensor in _shapes(plan, site):
            values[f"{site.fqn}.{tensor}"] = held[f"{path}.{tensor}"]
    return values


def _shapes(plan: Plan, site: Site) -> dict[str, tuple[int, ...]]:
    """Of the tensors that a site holds itself."""
    spec = plan.spec_of(site)
    rotation = {} if site.shared else method_of(spec).shapes(spec, site.in_features)
    return {**rotation, **output_shapes(spec, site.out_features)}


def _fingerprint(model: Model, plan: Plan) -> dict[str, list[float] | None]:
    """A few values of each adapted weight; None where it is on `meta`."""
    weights = Fingerprint(model)
    return {site.weight: weights.samples(site.weight) for site in plan.sites}


def _read(path: Path) -> tuple[Plan, dict[str, Tensor], dict[str, Any]]:
    """Reads and checks a directory by itself."""
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory; oftfx.save writes one.")
    if not (path / MANIFEST).is_file():
        foreign = (path / "adapter_config.json").is_file()
        hint = ": it is PEFT's, which this version does not read." if foreign else "."
        if nested := sorted(path.glob(f"*/{MANIFEST}")):
            hint = f"; did you mean {nested[0].parent}?"
        raise CheckpointError(f"{path} holds no {MANIFEST}{hint}")
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        stated = manifest.pop("checksum")
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{path / MANIFEST} has format {manifest['format']}, this version reads {FORMAT}: "
                f"it was written by oftfx {manifest.get('oftfx')}; install that or a newer one."
            )
        intact = stated == _checksum(manifest)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged or foreign: {error!r}.") from error
    if not intact:
        raise CheckpointError(f"{path / MANIFEST} was changed or damaged after it was written.")
    try:
        plan = Plan.from_json(json.dumps(manifest["plan"]))
    except OftfxError as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}") from error

    file = path / TENSORS
    if not file.is_file():
        raise CheckpointError(f"{file} is missing.")
    payload = file.read_bytes()
    try:
        values = deserialise(payload)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file: {error}.") from error
    _check_tensors(plan, values, file)
    if hashlib.sha256(payload).hexdigest() != manifest["sha256"]:
        raise CheckpointError(f"{file} is not the file that {MANIFEST} was written for.")
    return plan, values, manifest["base"]


def _check_tensors(plan: Plan, values: dict[str, Tensor], file: Path) -> None:
    expected = {
        f"{site.fqn}.{tensor}": shape
        for site in plan.sites
        for tensor, shape in _shapes(plan, site).items()
    }
    for key, shape in expected.items():
        if key not in values:
            raise CheckpointError(f"{file} lacks the tensor {key!r}.")
        if tuple(values[key].shape) != shape:
            raise CheckpointError(
                f"{file}: {key!r} has shape {tuple(values[key].shape)}, its plan says {shape}."
            )
    if extra := sorted(set(values) - set(expected)):
        raise CheckpointError(f"{file} holds tensors its plan does not know: {', '.join(extra)}.")


def _check_base(model: Model, plan: Plan, base: dict[str, Any], path: Path) -> None:
    weights = Fingerprint(model)
    for site in plan.sites:
        shape = weights.shape(site.weight)
        if shape is None:
            raise CheckpointError(
                f"{path} was trained on another base: this one has no {site.weight}."
            )
        if shape != site.shape:
            raise CheckpointError(
                f"{path} was trained on another base: {site.weight} is {shape} here, "
                f"{site.out_features}×{site.in_features} there."
            )
        there = base.get(site.weight)
        if not weights.agree(site.weight, there, quantised_there=is_quantised(site.kind)):
            raise CheckpointError(
                f"{path} was trained on another base: the values of {site.weight} differ. Load the "
                "weights it was trained on (unmerged, and initialised before loading)."
            )


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write(path: Path, payload: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(payload)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
