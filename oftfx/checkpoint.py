"""Adapters on disk: safetensors and JSON, no pickle.

    adapter/
      adapter.safetensors   a rotation's tensors, by site, and what was trained as it is
      adapter.json          spec, plan, versions, a fingerprint of the base, and checksums

Both are written under temporary names and then renamed; the JSON comes last and holds the other's
checksum, so a torn or mixed pair is noticed.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from oftfx import copied, inserted, modules
from oftfx.adapter import put, remove
from oftfx.attach import records_of
from oftfx.capture import Model, unwrap
from oftfx.errors import CheckpointError, OftfxError, OftfxWarning, PlanError, no_adapter
from oftfx.files import replace_all
from oftfx.fingerprint import Fingerprint
from oftfx.host import parameters_of
from oftfx.interop import peft
from oftfx.plan import Plan
from oftfx.progress import tracked
from oftfx.spread import check_alone, whole
from oftfx.weights import Weights

M = TypeVar("M", nn.Module, ExportedProgram)

FORMAT = 1
TENSORS, MANIFEST = "adapter.safetensors", "adapter.json"


def save(
    model: Model,
    directory: str | os.PathLike[str],
    name: str = "default",
    format: Literal["oftfx", "peft", "lora"] = "oftfx",
    rank: int | None = None,
) -> peft.LoraReport | None:
    """Writes one adapter of a model. Of one sharded by FSDP2, every process has to call it.

    What was trained is written, however far along it is applied: [`scale`][oftfx.scale] is the
    model's own.

    Args:
        model: An adapted nn.Module, GraphModule or ExportedProgram.
        directory: Made if missing; an adapter in it is replaced.
        name: Which adapter.
        format: ``"peft"`` writes what HF PEFT's ``from_pretrained`` loads to the same function
            (OFT, COFT, BOFT, HRA and PSOFT), ``"lora"`` what anything that knows PEFT's LoRA loads:
            the same function for PSOFT, LOFT and HRA, for the others the nearest of a rank. Both
            write each layer that shares a rotation a copy.
        rank: Of LoRA's factors; None for that of the method, where it has one.

    Returns:
        For ``"lora"``, what each site lost.

    Raises:
        PlanError: The model has no such adapter; or its weights, which LoRA needs, have no values.
        CheckpointError: The directory cannot be written, or the format cannot express the adapter.
        ValueError: ``format`` is none of these, or a rank is given to another than LoRA.

    Warns:
        OftfxWarning: The adapter has a scale, so that what is loaded computes something else.
    """
    inner = unwrap(model)
    plan = _plan(inner, name)
    _tell_scale(inner, name)
    values = {key: whole(value) for key, value in values_of(inner, plan, name).items()}
    if rank is not None and (format != "lora" or rank < 1):
        raise ValueError(f"rank={rank}: must be ≥ 1, and is for format='lora' alone.")
    report = None
    # Where the base came from, as transformers' models remember.
    base = getattr(getattr(inner, "config", None), "_name_or_path", None) or None
    match format:
        case "oftfx":
            files = _files(inner, plan, values)
        case "peft":
            files = peft.write(inner, plan, values, _own(inner, name), base)
        case "lora":
            own = _own(inner, name)
            files, report = peft.write_lora(plan, values, own, Weights(inner), rank, base)
        case _:
            raise ValueError(f"format={format!r}: must be 'oftfx', 'peft' or 'lora'.")
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        replace_all(path, files)
        for stale in {MANIFEST, TENSORS, peft.CONFIG, peft.TENSORS} - files.keys():
            (path / stale).unlink(missing_ok=True)  # of the adapter before, in another format
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}.") from error
    return report


def load(model: M, directory: str | os.PathLike[str], name: str = "default") -> M:
    """Adapts a base model with an adapter that [`save`][oftfx.save] or HF PEFT wrote.

    Args:
        model: The base, in any of the three forms.
        directory: What ``save`` wrote, or PEFT's ``save_pretrained`` (OFT, BOFT, HRA and PSOFT,
            by PEFT 0.16 or later).
        name: The name the adapter gets in this model.

    Returns:
        The adapted model, as [`adapt`][oftfx.adapt] does.

    Raises:
        CheckpointError: The directory is damaged, foreign, or belongs to another base. Says which
            part; the model is untouched.
        PlanError: The model has an adapter of this name already, or is wrapped for several
            processes.
    """
    check_alone(model)
    inner = unwrap(model)
    path = Path(directory)
    if peft.holds_peft(path) and (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} holds two adapters, one of {MANIFEST} and {TENSORS}, one of PEFT's "
            f"{peft.CONFIG} and {peft.TENSORS}: delete the two files of the one that is not meant."
        )
    if peft.holds_peft(path):
        plan, values = peft.read(inner, path)
    else:
        plan, values, manifest = _read(path)
        _check_base(inner, plan, manifest, path)
    taken = any(modules.is_rotation(inner, key, name) for key in parameters_of(inner))
    try:
        # What is never trained comes from the file too: no weight is decomposed, no batch run.
        adapted = put(model, plan, name, fixed=dict)
    except PlanError as error:
        if taken:
            raise
        raise CheckpointError(f"{directory} does not fit this model: {error}") from error
    try:
        _fill(unwrap(adapted), plan, name, values, path)
    except CheckpointError:
        remove(adapted, name)
        raise
    return adapted


def restore(model: Model, directory: str | os.PathLike[str], name: str = "default") -> None:
    """Puts the values that [`save`][oftfx.save] wrote into the same adapter of an adapted model.

    Raises:
        CheckpointError: The directory is damaged, holds another adapter, or belongs to another
            base; the model is untouched.
        PlanError: The model has no such adapter.
    """
    inner = unwrap(model)
    plan, values, manifest = _read(Path(directory))
    if json.loads(plan.to_json()) != json.loads(_plan(inner, name).to_json()):
        raise CheckpointError(
            f"{directory} holds another adapter than the model's {name!r}: adapt the model with "
            "the spec it was trained with."
        )
    _check_base(inner, plan, manifest, Path(directory))
    _fill(inner, plan, name, values, Path(directory))


@torch.no_grad()
def _fill(model: Model, plan: Plan, name: str, values: dict[str, Tensor], path: Path) -> None:
    """Copies what was read into an adapter; nothing of it when some cannot be copied."""
    held = values_of(model, plan, name)
    for key, parameter in held.items():
        if parameter.device.type == "meta":
            raise CheckpointError(
                f"{path} cannot be loaded: {key} would be on `meta`, as the base's weights are. "
                "Load those first: model.to_empty(device=…), then model.load_state_dict(…)."
            )
        if parameter.shape != values[key].shape:
            raise CheckpointError(
                f"{path}: {key!r} has shape {tuple(values[key].shape)}, the model's adapter "
                f"{tuple(parameter.shape)}."
            )
    for key, parameter in held.items():
        parameter.copy_(values[key])


def _tell_scale(model: Model, name: str) -> None:
    held = modules.holders(model, name) if isinstance(model, nn.Module) else ()
    scale = next((state.scaling for _, _, state in held), 1.0)
    if scale != 1:
        warnings.warn(
            f"{name!r} is applied at scale {scale:g}, and what was trained is saved, which is "
            f"scale 1: after oftfx.load, oftfx.scale(model, {scale:g}) computes what this model "
            "does; oftfx.merge folds what is applied.",
            OftfxWarning,
            stacklevel=3,
        )


def _plan(model: Model, name: str) -> Plan:
    if isinstance(model, (fx.GraphModule, ExportedProgram)):
        records = inserted.records(model)
        if name not in records:
            raise no_adapter("the graph", name, records)
        return Plan.from_json(records[name]["plan"])
    return records_of(model, name)[name].plan


def values_of(model: Model, plan: Plan, name: str) -> dict[str, Tensor]:
    """The adapter's tensors, those that are never trained included, by site."""
    held = parameters_of(model)
    values: dict[str, Tensor] = {}
    for site in plan.sites:
        path = modules.parameter_path(site.weight, name, site.kind == "functional")
        for tensor in plan.shapes(site):
            values[f"{site.fqn}.{tensor}"] = held[f"{path}.{tensor}"]
    if isinstance(model, nn.Module):  # a graph has none
        for part, _, copies in copied.of(model, name):
            values |= copies.parameters(part)
    return values


def _own(model: Model, name: str) -> dict[str, Tensor]:
    """The base's tensors by name, those besides that an adapter trains copies of."""
    held: dict[str, Tensor] = {
        key: value
        for key, value in parameters_of(model).items()
        if not modules.is_rotation(model, key)
    }
    if isinstance(model, nn.Module):  # a graph keeps none
        for _, _, copies in copied.of(model, name):
            held |= copies.own
    return held


def _fingerprint(model: Model, plan: Plan) -> dict[str, dict[str, Any]]:
    """A few values of each adapted weight, None where it is on `meta`; and how it is quantised."""
    weights = Fingerprint(model)
    sites = tracked(plan.sites, "sampling the base")
    return {
        "base": {site.weight: weights.samples(site.weight) for site in sites},
        "quantised": {site.weight: weights.quantised(site.weight) for site in plan.sites},
    }


def _read(path: Path) -> tuple[Plan, dict[str, Tensor], dict[str, Any]]:
    """Reads and checks a directory by itself."""
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory; oftfx.save writes one.")
    if not (path / MANIFEST).is_file():
        hint = f", nor an {peft.CONFIG} of PEFT's."
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
    return plan, values, manifest


def _check_tensors(plan: Plan, values: dict[str, Tensor], file: Path) -> None:
    expected = {
        f"{site.fqn}.{tensor}": shape
        for site in plan.sites
        for tensor, shape in plan.shapes(site).items()
    } | {tensor.name: tensor.shape for tensor in plan.copied}
    for key, shape in expected.items():
        if key not in values:
            raise CheckpointError(f"{file} lacks the tensor {key!r}.")
        if tuple(values[key].shape) != shape:
            raise CheckpointError(
                f"{file}: {key!r} has shape {tuple(values[key].shape)}, its plan says {shape}."
            )
    if extra := sorted(set(values) - set(expected)):
        raise CheckpointError(f"{file} holds tensors its plan does not know: {', '.join(extra)}.")


def _check_base(model: Model, plan: Plan, manifest: dict[str, Any], path: Path) -> None:
    weights = Fingerprint(model)
    # Not by the plan's kinds: they are of the base it was made for, and a float one may be saved.
    base, quantised = manifest["base"], manifest.get("quantised", {})
    for site in tracked(plan.sites, "checking the base"):
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
        if not weights.agree(site.weight, there, quantised.get(site.weight)):
            raise CheckpointError(
                f"{path} was trained on another base: the values of {site.weight} differ. Load the "
                "weights it was trained on (unmerged, and initialised before loading)."
            )

    for tensor in plan.copied:
        if (shape := weights.shape(tensor.name)) != tensor.shape:
            raise CheckpointError(
                f"{path} was trained on another base: {tensor.name} is {shape} here, "
                f"{tensor.shape} there."
            )


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _files(model: Model, plan: Plan, values: dict[str, Tensor]) -> dict[str, bytes]:
    """The contents of a directory in this library's own format."""
    from safetensors.torch import save as serialise

    from oftfx import __version__

    payload = serialise({key: value.detach().cpu().contiguous() for key, value in values.items()})
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "oftfx": __version__,
        "torch": torch.__version__,
        "plan": json.loads(plan.to_json()),
        **_fingerprint(model, plan),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    manifest["checksum"] = _checksum(manifest)
    return {TENSORS: payload, MANIFEST: json.dumps(manifest, indent=1).encode()}
