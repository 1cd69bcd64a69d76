"""Modules that hold the trainable state, and the classes an adapted module takes on.

    Linear                       OFT[Linear]               (a cached subclass of Linear)
      weight, bias                 weight, bias
                                   oft: ModuleDict
                                     default: Rotation
                                       theta

Only the class changes: the object, its names, its parameters and its place in the model stay, so
everything that holds on to the module keeps working, compiled graphs included.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from oftfx.modules.classes import (
    CHILD,
    Adapted,
    Class,
    bare,
    become,
    folding,
    hooked,
    own_forward,
    rotating,
    unhook,
)
from oftfx.modules.rotation import NOTE, Rotation, SharedRotation, built

__all__ = [
    "CHILD",
    "NOTE",
    "Adapted",
    "Class",
    "Rotation",
    "SharedRotation",
    "bare",
    "become",
    "built",
    "disabled",
    "folding",
    "hooked",
    "is_rotation",
    "own_forward",
    "parameter_path",
    "rotating",
    "rotations",
    "site_name",
    "unhook",
]


def parameter_path(weight: str, name: str, functional: bool = False) -> str:
    """Where a rotation lives: `fc.oft.default` for `fc.weight`, `fc.oft.default.w` for `fc.w`."""
    owner, _, leaf = weight.rpartition(".")
    return ".".join(filter(None, (owner, CHILD, name, leaf if functional else "")))


def is_rotation(parameter: str, name: str | None = None) -> bool:
    """Whether a parameter of this name is a rotation's, of one adapter or of any."""
    which = r"\w+" if name is None else name
    return re.fullmatch(rf"(.+\.)?{CHILD}\.{which}\.(\w+\.)?\w+", parameter) is not None


def site_name(owner: str, parameter: str) -> str:
    """A site's fqn: its weight's name without a trailing ".weight"."""
    return (f"{owner}.{parameter}" if owner else parameter).removesuffix(".weight")


def rotations(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Rotation]]:
    """Every rotation of a model with its site's fqn; of one adapter, or of all."""
    for fqn, module in model.named_modules():
        if not isinstance(module, Adapted):
            continue
        for adapter, held in module.oft.items():
            by_parameter = held.items() if isinstance(held, nn.ModuleDict) else [("weight", held)]
            for parameter, rotation in by_parameter:
                if name in (None, adapter) and isinstance(rotation, Rotation):
                    yield site_name(fqn, parameter), rotation


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Within it, the model computes what its base computes, bit for bit.

    Args:
        model: An adapted nn.Module, or anything that contains one.
        name: One adapter; None for all.
    """
    held = [(rotation, rotation.enabled) for _, rotation in rotations(model, name)]
    try:
        for rotation, _ in held:
            rotation.enabled = False
        yield
    finally:
        for rotation, enabled in held:
            rotation.enabled = enabled
