"""Modules that hold the trainable state, and the classes an adapted module takes on.

    Linear                       OFT[Linear]               (a cached subclass of Linear)
      weight, bias                 weight, bias
                                   oft: ModuleDict
                                     default: Rotation
                                       theta

Only the class changes: the object, its names, its parameters and its place in the model stay, so
everything that holds on to the module keeps working, compiled graphs included.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import fx, nn

from oftfx.copied import RECORD, check_apart, of, settle
from oftfx.errors import PlanError, no_adapter
from oftfx.modules.classes import (
    CHILD,
    Adapted,
    Class,
    bare,
    become,
    folding,
    hooked,
    order,
    ordered,
    own_forward,
    rotating,
    unhook,
)
from oftfx.modules.rotation import NOTE, Rotation, SharedRotation, built

State: TypeAlias = Rotation | SharedRotation

__all__ = [
    "CHILD",
    "NOTE",
    "RECORD",
    "Adapted",
    "Class",
    "Rotation",
    "SharedRotation",
    "State",
    "absent",
    "bare",
    "become",
    "built",
    "chosen",
    "folding",
    "holders",
    "hooked",
    "in_order",
    "in_use",
    "is_rotation",
    "kept",
    "ordered",
    "own_forward",
    "parameter_path",
    "rotating",
    "rotations",
    "select",
    "site_name",
    "unhook",
]


def parameter_path(weight: str, name: str, functional: bool = False) -> str:
    """Where a rotation lives: `fc.oft.default` for `fc.weight`, `fc.oft.default.w` for `fc.w`."""
    owner, _, leaf = weight.rpartition(".")
    return ".".join(filter(None, (owner, CHILD, name, leaf if functional else "")))


def is_rotation(model: Any, parameter: str, name: str | None = None) -> bool:
    """Whether a model's parameter of this name is a rotation's, of one adapter or of any."""
    which = r"\w+" if name is None else re.escape(name)
    found = re.fullmatch(rf"(?:(.+)\.)?{CHILD}\.{which}\.(?:\w+\.)?\w+", parameter)
    if found is None or isinstance(model, fx.GraphModule) or not isinstance(model, nn.Module):
        return found is not None
    return isinstance(model.get_submodule(found[1] or ""), Adapted)  # else a module of that name


def site_name(owner: str, parameter: str) -> str:
    """A site's fqn: its weight's name without a trailing ".weight"."""
    return (f"{owner}.{parameter}" if owner else parameter).removesuffix(".weight")


def holders(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, str, State]]:
    """What adapters hold of a model's sites: adapter, the site's fqn, and the state there.

    Args:
        model: An nn.Module, or anything that contains one.
        name: One adapter; None for all.
    """
    for fqn, module in model.named_modules():
        if isinstance(module, Adapted):
            for adapter, parameter, state in _held(module):
                if name in (None, adapter):
                    yield adapter, site_name(fqn, parameter), state


def _adapted(model: nn.Module) -> list[Adapted]:
    return [module for module in model.modules() if isinstance(module, Adapted)]


def _held(module: Adapted) -> Iterator[tuple[str, str, State]]:
    """What adapters hold of one module: adapter, the parameter's name, and the state there."""
    for adapter, held in module.oft.items():
        by_parameter = held.items() if isinstance(held, nn.ModuleDict) else [("weight", held)]
        for parameter, state in by_parameter:
            if isinstance(state, State):
                yield adapter, parameter, state


def rotations(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Rotation]]:
    """Every rotation of a model with its site's fqn; of one adapter, or of all."""
    for _, fqn, state in holders(model, name):
        if isinstance(state, Rotation):
            yield fqn, state


def in_order(model: nn.Module) -> dict[str, bool]:
    """Whether each of a model's adapters is in use; in the order x meets them."""
    adapted = _adapted(model)
    chosen = (name for module in adapted for name in module.oft_order)
    added = (name for module in model.modules() for name in vars(module).get(RECORD, ()))
    found = [(adapter, state) for m in adapted for adapter, _, state in _held(m)]
    used = {adapter for adapter, state in found if state.enabled}
    names = dict.fromkeys((*chosen, *added, *(adapter for adapter, _ in found)))
    return {name: name in used for name in _merged([*names], set(map(order, adapted)))}


def _merged(names: list[str], orders: Collection[tuple[str, ...]]) -> Iterator[str]:
    """Names as they stand, but for what several orders of some of them say."""
    while names:
        late = {b for order in orders for a, b in itertools.combinations(order, 2) if a in names}
        name = next((name for name in names if name not in late), names[0])
        names.remove(name)
        yield name


def in_use(model: nn.Module) -> list[str]:
    """A model's adapters that are in use, in the order x meets them."""
    return [name for name, used in in_order(model).items() if used]


def absent(model: Any, name: str | None = None) -> PlanError:
    """What to raise where a model lacks an adapter: this one, or any in use for None."""
    kind, held = type(model).__name__, list(in_order(model)) if isinstance(model, nn.Module) else []
    if name is not None or not held:
        return no_adapter(kind, name, held)
    return PlanError(
        f"{kind} has no adapter in use, of {sorted(held)}: oftfx.use(model, {held[0]!r})."
    )


def chosen(model: nn.Module, names: str | Sequence[str]) -> list[str]:
    """The adapters that are meant.

    Raises:
        PlanError: The model has no adapter of a name, one is named twice, or two of them train the
            same tensor as it is.
    """
    if not isinstance(names, Iterable):
        raise PlanError(f"{names!r} names no adapter: pass a name, or several in their order.")
    found = [names] if isinstance(names, str) else list(names)
    known = in_order(model)
    for name in found:
        if name not in known:
            raise absent(model, str(name))
    if len(set(found)) < len(found):
        raise PlanError(f"{found} names an adapter twice: it has one place in the order.")
    check_apart({adapter: copies.own for _, adapter, copies in of(model) if adapter in found})
    return found


def select(model: nn.Module, names: Sequence[str]) -> None:
    """Puts these adapters to use and no others, in this order."""
    for module in _adapted(model):
        module.oft_order = tuple(names)
        for adapter, _, state in _held(module):
            if isinstance(state, Rotation):
                state.enabled = adapter in names
            if state.readers is not None:
                state.readers.useful = True  # whoever read apart behind another may not now
    settle(model, names)


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """After it, those adapters are in use that were before, in their order."""
    orders = [(module, module.oft_order) for module in _adapted(model)]
    states = [state for module, _ in orders for _, _, state in _held(module)]
    held = [(state, state.enabled) for state in states if isinstance(state, Rotation)]
    try:
        yield
    finally:
        for module, order in orders:
            if isinstance(module, Adapted):  # still
                module.oft_order = order
        for rotation, enabled in held:
            rotation.enabled = enabled
        settle(model, in_use(model))
