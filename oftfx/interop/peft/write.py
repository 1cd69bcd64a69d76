"""From a plan and its rotations' tensors to a PEFT directory."""

import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from oftfx.capture import Model
from oftfx.errors import CheckpointError, OftfxError
from oftfx.interop.peft.copied import beside, write_copied
from oftfx.interop.peft.directory import CONFIG, PREFIX, TENSORS
from oftfx.interop.peft.formats import FORMATS, NAMES
from oftfx.plan import Plan, Site
from oftfx.rotations import method_of, output_shapes
from oftfx.sites import is_quantised
from oftfx.sites.conv1d import KIND as CONV1D
from oftfx.sites.embedding import KIND as EMBEDDING
from oftfx.spec import Spec
from oftfx.weights import Weights

PEFT_VERSION = "0.21.2"
"""The version whose files these are; what they mean has not changed since 0.18."""


def write(
    model: Model,
    plan: Plan,
    values: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    base: str | None,
) -> dict[str, bytes]:
    """The contents of a PEFT directory's files.

    Args:
        model: The adapted model.
        plan: What is adapted.
        values: The adapter's tensors, as [`save`][oftfx.save] names them. A rotation that several
            sites share is written to each of them.
        own: All tensors of the base by name.
        base: Where the base came from, for PEFT's own use.

    Raises:
        CheckpointError: PEFT cannot express the adapter. Says which site or field.
    """
    method = type(plan.spec)
    if method not in NAMES:
        raise CheckpointError(f"PEFT has no {method.__name__}: save it without format=.")
    name = NAMES[method]
    form = FORMATS[name]
    weights = Weights(model)
    tensors: dict[str, Tensor] = {}
    for site in plan.sites:
        spec = plan.spec_of(site)
        check_layer(site, spec, form.OUTPUTS)
        held = {
            key: values[f"{site.rotation}.{key}"]
            for key in method_of(spec).shapes(spec, site.in_features)
        }
        for key in form.OUTPUTS:
            held[key] = values.get(f"{site.fqn}.{key}", torch.zeros(site.out_features))
        weight = partial(weights.floats, site)
        try:
            converted = form.theirs(spec, held, weight)
        except OftfxError as error:
            raise CheckpointError(f"{site.fqn}: {error}") from error
        if name == "PSOFT" and is_quantised(site.kind):
            raise CheckpointError(
                f"{site.fqn} is quantised, where PEFT has no PSOFT; of a float weight it computes "
                "other directions. Write format='lora', which is exact."
            )
        if site.kind == CONV1D:
            raise CheckpointError(
                f"{site.fqn} is a Conv1D, of which PEFT has no {name}. Write format='lora'."
            )
        if site.kind == EMBEDDING:
            if not form.EMBEDDED:
                raise CheckpointError(f"{site.fqn}: PEFT's {name} has no embeddings.")
            converted = {form.EMBEDDED[suffix]: tensor for suffix, tensor in converted.items()}
        tensors |= {f"{site.fqn}.{suffix}": tensor for suffix, tensor in converted.items()}
    copied, fields = write_copied(plan, name, values, own)
    config = header(plan, own, base) | form.config(
        {site.fqn: plan.spec_of(site) for site in plan.sites},
        {site.fqn: site.in_features for site in plan.sites},
    )
    return files(
        beside(model, plan, own) | tensors | copied,
        config | fields | {"init_weights": True, "peft_type": name},
    )


def check_layer(site: Site, spec: Spec, outputs: Collection[str] = ()) -> None:
    """That a site is a layer of its own, and only its input is mapped.

    Args:
        site: The site.
        spec: Its spec.
        outputs: What may be trained behind its matmul.

    Raises:
        CheckpointError: It is a bare parameter, or its outputs are scaled.
    """
    if not output_shapes(spec, site.out_features).keys() <= set(outputs):
        raise CheckpointError(
            f"{site.fqn}: magnitude=True scales its outputs, which neither PEFT's OFT nor LoRA can "
            "express: save it without format=, or merge it."
        )
    if site.kind == "functional":
        raise CheckpointError(f"{site.fqn} is no layer of its own, which PEFT cannot adapt.")


def header(plan: Plan, own: Collection[str], base: str | None) -> dict[str, Any]:
    """The part of the config that is the same for every method.

    Args:
        plan: What is adapted.
        own: The names of all tensors of the base.
        base: Where the base came from.
    """
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "exclude_modules": None,
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_version": PEFT_VERSION,
        "revision": None,
        "target_modules": _targets([site.fqn for site in plan.sites], own),
        "task_type": None,
    }


def _targets(sites: list[str], own: Collection[str]) -> list[str] | str:
    """The names of the sites; a regex of them where PEFT would take other modules for them.

    It compares names in a list with the ends of modules' names, a regex with the whole of them.
    """
    paths = (name.split(".")[:-1] for name in own)
    owners = {".".join(path[:end]) for path in paths for end in range(1, len(path) + 1)}
    endings = tuple(f".{fqn}" for fqn in sites)
    if any(name.endswith(endings) for name in owners - set(sites)):
        return "|".join(map(re.escape, sites))
    return sites


def files(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, bytes]:
    """The contents of the two files."""
    from safetensors.torch import save

    # Copies, since safetensors refuses names of one tensor, as shared rotations have.
    own = {
        PREFIX + key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()
    }
    return {
        TENSORS: save(own, metadata={"format": "pt"}),
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
