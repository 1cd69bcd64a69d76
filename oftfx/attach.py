"""Plan → nn.Module: every site's module takes on the class that rotates its input."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from oftfx import copied, fast_path
from oftfx.bank import Bank
from oftfx.copied import Copies
from oftfx.errors import PlanError, no_adapter
from oftfx.fixed import Fixed
from oftfx.modules import (
    CHILD,
    RECORD,
    Adapted,
    Class,
    Rotation,
    SharedRotation,
    bare,
    become,
    folding,
    hooked,
    in_order,
    in_use,
    own_forward,
    rotating,
    rotations,
)
from oftfx.plan import Plan, Site
from oftfx.readers import Readers
from oftfx.sites import pretrained, quantiser_of, shape_of
from oftfx.sites.quantised import device_of

BANK = "_oftfx_bank"


@dataclass
class Record:
    """What an adapted model remembers of one adapter.

    Attributes:
        plan: The plan it was built from.
        trained: Names of the base's parameters that required a gradient before.
        copies: What it trains as it is.
        made: When, in ns: of parts that were adapted one within the other, each remembers what the
            earlier ones left, so that they come off the latest first.
    """

    plan: Plan
    trained: frozenset[str]
    copies: Copies
    made: int = field(default_factory=time.time_ns)


def attach(model: nn.Module, plan: Plan, name: str, fixed: Fixed) -> None:
    """Adapts a module in place and freezes its base.

    Args:
        model: The module.
        plan: What to adapt.
        name: Of the adapter.
        fixed: Called once the plan is known to fit, before anything is changed.

    Raises:
        PlanError: The plan does not fit the model, or an adapter of this name is there already.
            The model is untouched then.
    """
    records = _records(model)
    if name in records:
        raise PlanError(
            f"the model has an adapter {name!r} already: remove it with oftfx.remove(model, "
            f"{name!r}), or pass another name."
        )
    for _, module in model.named_modules():
        if isinstance(module, Adapted) and name in module.oft:
            raise PlanError(f"a part of the model has an adapter {name!r} already.")
    for site in plan.sites:
        _check(model, site)
    copied.check(model, plan.copied)
    used = in_use(model)
    present = {other: r.copies.own for other, r in records.items() if other in used}
    copied.check_apart({**present, name: [tensor.name for tensor in plan.copied]})
    values = fixed()

    if records:  # the first adapter saw the base's own flags
        trained = next(iter(records.values())).trained
    else:
        everything = model.named_parameters(remove_duplicate=False)
        trained = frozenset(n for n, p in everything if p.requires_grad)
    adapted = (module for module in model.modules() if isinstance(module, Adapted))
    mine = {id(p) for module in adapted for p in module.oft.parameters()}
    for record in records.values():
        mine |= {id(copy) for copy in record.copies.parameters(model).values()}
    for parameter in model.parameters():
        if id(parameter) not in mine:
            parameter.requires_grad_(False)
    _pin(model)
    held: dict[str, Rotation] = {}
    for site in plan.sites:
        if site.shared:
            device, seed = _device(model, site), plan.seed_of(site.fqn)
            shared = SharedRotation(held[site.rotation], site.out_features, device, seed)
            place(model, site, name, shared)
        else:
            held[site.fqn] = _rotation(model, plan, site)
            held[site.fqn].fill(values.get(site.fqn, {}))
            place(model, site, name, held[site.fqn])
    _acquaint(model, plan, name)
    fast_path.leave(model)
    copies = Copies(model, plan.copied, [record.copies for record in records.values()])
    copies.put(model)
    vars(model)[RECORD] = {**records, name: Record(plan, trained, copies)}
    _open_bank(model)


def detach(model: nn.Module, name: str | None = None, merged: bool = False) -> None:
    """Takes adapters off a module and its parts and gives classes and gradient flags back.

    Args:
        model: An adapted module.
        name: One adapter; None for all.
        merged: The weights are folded: what was trained as it is stays, too.

    Raises:
        PlanError: There is no such adapter.
    """
    parts = [part for part in model.modules() if _records(part, name)]
    if not parts:
        raise no_adapter(type(model).__name__, name, in_order(model))
    for part in sorted(parts, key=lambda part: -next(iter(_records(part).values())).made):
        _detach_part(part, name, merged)
    for part in model.modules():
        if BANK in vars(part):
            _open_bank(part)


def _detach_part(model: nn.Module, name: str | None, merged: bool) -> None:
    """Takes off what was attached to this very module."""
    records, leaving = _records(model), dict(_records(model, name))
    displace(model, leaving)
    fast_path.restore(model)
    for adapter, record in leaving.items():
        del records[adapter]
        if not merged:
            record.copies.take_away(model)
        if not records:
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter_name in record.trained)
    if not records:
        vars(model).pop(RECORD, None)
        _unpin(model)


def _pin(model: nn.Module) -> None:
    """Readies every quantised layer for training through it, adapted or not."""
    for module in model.modules():
        if (quantiser := quantiser_of(module)) is not None:
            quantiser.pin(module)
    pretrained.allow_training(model)


def _unpin(model: nn.Module) -> None:
    for module in model.modules():
        if (quantiser := quantiser_of(module)) is not None:
            quantiser.unpin(module)
    pretrained.forbid_training(model)


def records_of(model: nn.Module, name: str | None = None) -> dict[str, Record]:
    """The records of an adapted module, by adapter name.

    Raises:
        PlanError: The module has no adapter, or none of this name.
    """
    records = _records(model)
    if not _records(model, name):
        raise no_adapter(type(model).__name__, name, records)
    return records


def _records(model: nn.Module, name: str | None = None) -> dict[str, Record]:
    """What was attached to this very module: all of it, or one adapter."""
    records: dict[str, Record] = vars(model).get(RECORD, {})
    return records if name is None else {name: records[name]} if name in records else {}


def _open_bank(model: nn.Module) -> None:
    """Gives the model a bank of the rotations it has now."""
    if (old := vars(model).pop(BANK, None)) is not None:
        old.remove()
    if found := [rotation for _, rotation in rotations(model)]:
        vars(model)[BANK] = Bank(model, found)


def place(model: nn.Module, site: Site, name: str, rotation: nn.Module) -> None:
    """Puts what maps a site's input in its place, after what is there."""
    module, parameter = _owner(model, site)
    if CHILD not in module._modules:
        module.add_module(CHILD, nn.ModuleDict())
    base: Class = module.oft_base if isinstance(module, Adapted) else type(module)
    adapters = module.get_submodule(CHILD)
    assert isinstance(adapters, nn.ModuleDict)
    if site.kind != "functional":
        adapters[name] = rotation
        become(module, rotating(base))
        return
    if name not in adapters:
        adapters[name] = nn.ModuleDict()
    adapters[name][parameter] = rotation  # type: ignore[operator]
    shadowed = {*getattr(module, "oft_shadowed", ()), (parameter, site.layout)}
    become(module, folding(base, tuple(sorted(shadowed))))


def displace(model: nn.Module, names: Iterable[str] | None) -> None:
    """Takes what was placed under these names away (all for None)."""
    for module in list(model.modules()):
        if not isinstance(module, Adapted):
            continue
        held = module.oft
        leaving = set(held if names is None else names) & held.keys()
        if len(leaving) == len(held):
            bare(module)
        elif leaving:
            for adapter in leaving:
                del held[adapter]
            module.oft_order = tuple(name for name in module.oft_order if name not in leaving)


def _owner(model: nn.Module, site: Site) -> tuple[nn.Module, str]:
    path, _, parameter = site.weight.rpartition(".")
    return model.get_submodule(path), parameter


def _check(model: nn.Module, site: Site) -> None:
    """That a site can be placed; nothing is changed before every site passed."""
    try:
        module, parameter = _owner(model, site)
        shape = shape_of(module, parameter)
        assert shape is not None
    except (AttributeError, AssertionError):
        raise PlanError(
            f"{site.weight}: the plan's weight is not a parameter of this model; plan it anew."
        ) from None
    if shape != site.shape:
        raise PlanError(
            f"{site.weight} has shape {shape}, the plan expects "
            f"{site.in_features}→{site.out_features}: it was made for another model."
        )
    if not isinstance(module, Adapted) and hasattr(module, CHILD):
        raise PlanError(
            f"{type(module).__name__} at {site.fqn!r} has an attribute {CHILD!r} of its own, the "
            "name under which oftfx keeps rotations: rename it, or exclude the site."
        )
    if site.kind == "functional" and hasattr(nn.ModuleDict(), parameter):
        raise PlanError(
            f"{site.weight}: oftfx keeps rotations under their parameter's name in an "
            f"nn.ModuleDict, which takes none called {parameter!r}: rename it, or exclude the site."
        )
    bypassed = "forward" in vars(module) and not (hooked(module) or own_forward(module))
    if bypassed and site.kind != "functional":
        raise PlanError(
            f"{site.fqn} carries a forward of its own (set on the instance, as some offloading or "
            "patching tools do), which would bypass the rotation: undo that before adapting, or "
            "exclude the site."
        )


def _rotation(model: nn.Module, plan: Plan, site: Site) -> Rotation:
    device, seed = _device(model, site), plan.seed_of(site.rotation)
    return Rotation(plan.spec_of(site), site.in_features, device, seed, site.out_features)


def _device(model: nn.Module, site: Site) -> torch.device:
    """Where a site's parameters live."""
    module, parameter = _owner(model, site)
    weight = module._parameters.get(parameter)
    device = device_of(module) if weight is None else weight.device
    hook = vars(module).get("_hf_hook")
    if device.type == "meta" and hook is not None:  # offloaded: its weight is elsewhere
        device = torch.device(getattr(hook, "execution_device", None) or "cpu")
    return device


def _acquaint(model: nn.Module, plan: Plan, name: str) -> None:
    """Lets the rotations of one input tensor know of each other."""
    groups: dict[int, dict[str, Any]] = {}
    for site in plan.sites:
        if site.kind != "functional":  # which folds on the fly, and never rotates its input
            adapters: Any = _owner(model, site)[0].oft
            groups.setdefault(site.group, {})[site.fqn] = adapters[name]
    for members in groups.values():
        if len(members) > 1:
            near = len({fqn.rpartition(".")[0] for fqn in members}) == 1
            readers = Readers({held: held.rotation for held in members.values()}, near)
            for held in members.values():
                held.readers = readers
