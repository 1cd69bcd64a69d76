"""What PEFT trains besides its rotations: whole modules (``modules_to_save``) and biases.

    score.weight                         of a module to save
    fc.bias, fc.base_layer.bias          biases; of an adapted layer with PEFT's name for the layer
    embed_tokens.base_layer.weight       the base's own: with an adapted embedding, for safety

With ``bias="all"`` PEFT also writes the biases of modules to save twice more, as it names them and
as the base has them.
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from oftfx.capture import Model
from oftfx.errors import CheckpointError, OftfxWarning
from oftfx.fingerprint import Fingerprint
from oftfx.interop.peft.directory import CONFIG, TENSORS, Directory
from oftfx.plan import Plan
from oftfx.spec.rules import exactly

BASE = ".base_layer."
TWICE = (".modules_to_save.", ".original_module.")
EMBEDDINGS = ("embed_tokens", "lm_head")
"""Layers whose own weight PEFT writes beside their rotation, by the last part of their name."""


def read_copied(
    found: Directory, rest: Mapping[str, Tensor], layers: Collection[str], model: Model
) -> dict[str, Tensor]:
    """The tensors that were trained as they are, by the base's names.

    Args:
        found: The directory.
        rest: Its tensors that are no rotation's.
        layers: The layers that are rotated.
        model: The base.

    Raises:
        CheckpointError: One is no tensor of the base, has another shape, or is a weight under a
            rotation, and another than the base has.
    """
    base, file = Fingerprint(model), found.path / TENSORS
    copied = {}
    for key, tensor in rest.items():
        if any(mark in key for mark in TWICE):
            continue
        name = key.replace(BASE, ".")
        shape = base.shape(name)
        if shape is None:
            raise CheckpointError(
                f"{file} holds {key}, which is neither a rotation of PEFT's {found.method} nor a "
                "tensor of this base."
            )
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{found.path} was trained on another base: {name} is {shape} here, "
                f"{tuple(tensor.shape)} there."
            )
        if name.removesuffix(".weight") not in layers:
            copied[name] = tensor
        elif name not in base.layers:
            own = base.parameters[name].detach()
            if not torch.equal(own, tensor.to(own)):
                raise CheckpointError(
                    f"{file} holds another {name} than this base has, under a rotation: load the "
                    "weights it was trained on."
                )
    kind = found.value("bias", "none", str)
    biased = any(base.shape(f"{fqn}.bias") is not None for fqn in layers)
    if kind != "none" and biased and not any(_is_bias(name) for name in copied):
        warnings.warn(
            f"{found.path / CONFIG} says bias={kind!r}, but {TENSORS} holds no bias: this version "
            "of PEFT trained them and did not save them. The base's are used.",
            OftfxWarning,
            stacklevel=2,
        )
    return copied


def rules(copied: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What ``also_train`` has to say for exactly these tensors."""
    return tuple(map(exactly, copied))


def write_copied(
    plan: Plan, method: str, values: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT's tensors and config fields for what was trained as it is.

    Args:
        plan: What is adapted.
        method: PEFT's name of the method.
        values: The tensors that were trained.
        own: All tensors of the base by name, for those that were trained the base's.

    Raises:
        CheckpointError: They are neither whole modules, nor all biases, nor those of the layers
            that are rotated.
    """
    adapted = {site.fqn for site in plan.sites}
    names = {tensor.name for tensor in plan.copied}
    owners = {name.rpartition(".")[0] for name in names if not _is_bias(name)}
    whole = {name for name in own if name.rpartition(".")[0] in owners}
    if parts := sorted(whole - names):
        raise CheckpointError(
            f"{parts[0]} is not trained and another tensor of its module is: PEFT has whole "
            "modules to save, or biases."
        )
    for module in sorted({name.rpartition(".")[0] for name in own} - owners):
        if ends := [owner for owner in owners if module.endswith(owner)]:
            raise CheckpointError(
                f"{module} is not trained as it is; PEFT would take it for {ends[0]}, with which "
                "its name ends."
            )
    biases = {name for name in own if _is_bias(name)}
    loose = names - whole
    if not loose:
        kind = "none"
    elif loose | whole >= biases:
        kind = "all"
    elif loose == {name for name in biases if name.rpartition(".")[0] in adapted}:
        kind = f"{method.lower()}_only"
    else:
        raise CheckpointError(
            f"{sorted(loose)[0]}: PEFT trains all biases of a model, those of the rotated layers, "
            "or none, not some."
        )
    if kind != "none" and method == "PSOFT":
        raise CheckpointError(f"PEFT's PSOFT has no bias={kind!r}.")
    tensors = {_theirs(name, adapted): values[name] for name in names}
    if kind == "all":
        for name in whole & biases:
            module = name.rpartition(".")[0]
            tensors[f"{module}{TWICE[0]}bias"] = values[name]
            tensors[f"{module}{TWICE[1]}bias"] = own[name]
    return tensors, {"bias": kind, "modules_to_save": sorted(owners) or None}


def beside(model: Model, plan: Plan, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's own tensors that PEFT writes beside rotated embeddings of a transformers model."""
    if not hasattr(model, "get_input_embeddings"):
        return {}
    adapted = {site.fqn for site in plan.sites if site.fqn.rpartition(".")[2] in EMBEDDINGS}
    names = (name for name in own if name.rpartition(".")[0] in adapted)
    return {_theirs(name, adapted): own[name] for name in names}


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def _theirs(name: str, adapted: Collection[str]) -> str:
    """PEFT's name of a tensor of the base."""
    module, _, leaf = name.rpartition(".")
    return f"{module}{BASE}{leaf}" if module in adapted else name
