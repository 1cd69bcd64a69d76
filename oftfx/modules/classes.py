"""The classes that adapted modules take on, and how they do."""

import functools
import types
from typing import Any, TypeAlias

from torch import Tensor, nn

from oftfx.modules import rows
from oftfx.modules.fused import fused, multiplied
from oftfx.modules.rows import Rows
from oftfx.sites import fusing

Class: TypeAlias = Any  # a subclass of nn.Module; type checkers take classes for unhashable
CHILD = "oft"
"""Name of the child that holds a module's rotations, by adapter name."""


class Adapted(nn.Module):
    """What every adapted module is an instance of, besides its own class."""

    oft: nn.ModuleDict
    oft_base: type[nn.Module]
    oft_shadowed: tuple[tuple[str, str], ...] = ()
    oft_order: tuple[str, ...] = ()
    """Adapters that come before the others, in the order x meets them."""
    oft_rows: Rows | None = None
    """Which adapter each row of a batch goes through, where they differ."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle names its parts instead.
        return _rebuild, (self.oft_base, self.oft_shadowed), self.__getstate__()


def ordered(module: Any) -> list[Any]:
    """What each adapter holds of an adapted module, in the order x meets them."""
    # Not module.oft, for which nn.Module's own lookup takes longer than all of this.
    held, first = module._modules[CHILD], module.oft_order
    if not first:
        return list(held._modules.values())
    return [held[name] for name in order(module)]


def order(module: Adapted) -> tuple[str, ...]:
    """The adapters of a module, in the order x meets them."""
    first = tuple(name for name in module.oft_order if name in module.oft)
    return (*first, *(name for name in module.oft if name not in first))


@functools.cache
def rotating(base: Class) -> type[nn.Module]:
    """The subclass of a linear layer's class that rotates its input; an embedding's, its output.

    before                after
    y = base(x)           x = rotate(x, cayley(theta))      per adapter and factor, in order
                          y = base(x)
                          y = scale(y, magnitude, bias)     where the spec asks for it
    """
    layers = fusing(base)

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.oft_rows is not None:
            return rows.run(self, base, input, *args, **kwargs)
        used = [rotation for rotation in ordered(self) if rotation.enabled]
        if layers is not None and (output := fused(self, layers, used, input)) is not None:
            return output
        for rotation in used:
            input = rotation(input)
        output = None
        if layers is not None and used:
            output = multiplied(self, layers, input)
        if output is None:
            output = base.forward(self, input, *args, **kwargs)
        for rotation in used:
            if rotation.outputs:
                output = rotation.scaled(output, getattr(self, "bias", None))
        return output

    def looked_up(self: Any, input: Tensor) -> Tensor:
        found: Tensor = base.forward(self, input)
        for rotation in ordered(self):
            if rotation.enabled:
                found = rotation(found)
        return found

    if issubclass(base, nn.Embedding):
        forward = looked_up
    name = f"OFT[{base.__name__}]"
    body = {"forward": forward, "oft_base": base, "__module__": base.__module__}
    return type(name, (Adapted, base), {**body, "__doc__": base.__doc__})


@functools.cache
def folding(base: Class, shadowed: tuple[tuple[str, str], ...]) -> type[nn.Module]:
    """The subclass of a module's class whose weights read as ``W Mᵀ``, folded on the fly.

    Right however the owner uses the weight; its gradient needs that of the folded weight, so it
    costs more than a rotation where the activation is long.

    Args:
        base: The class.
        shadowed: Name and layout of each weight.
    """

    def folded(name: str, layout: str) -> property:
        def read(self: Any) -> Tensor:
            try:
                weight: Tensor = self._parameters[name]
                for rotations in reversed(ordered(self)):  # x·R1·R2 folds as W·R2ᵀ·R1ᵀ
                    if name in rotations and rotations[name].enabled:
                        weight = rotations[name].fold(weight, layout).to(weight.dtype)
                return weight
            except AttributeError as error:
                # nn.Module would take it for a missing attribute and answer with the raw weight.
                raise RuntimeError(f"folding {name} failed: {error}") from error

        return property(read)

    name = f"OFT[{base.__name__}]"
    body: dict[str, Any] = {key: folded(key, layout) for key, layout in shadowed}
    body |= {"oft_base": base, "oft_shadowed": shadowed, "__module__": base.__module__}
    return type(name, (Adapted, base), {**body, "__doc__": base.__doc__})


def _rebuild(base: Class, shadowed: tuple[tuple[str, str], ...]) -> nn.Module:
    cls = folding(base, shadowed) if shadowed else rotating(base)
    return cls.__new__(cls)


def bare(module: Adapted) -> None:
    """Gives a module its own class back and drops its rotations."""
    del module._modules[CHILD]
    for name in ("oft_order", "oft_rows"):
        vars(module).pop(name, None)
    become(module, module.oft_base)


def hooked(module: nn.Module) -> bool:
    """Whether accelerate wrapped this module's forward, in the way `become` knows."""
    inner = vars(module).get("_old_forward")
    return "_hf_hook" in vars(module) and isinstance(inner, types.MethodType)


def own_forward(module: nn.Module) -> bool:
    """Whether an instance's forward is merely its class's, as accelerate's hooks leave behind."""
    return getattr(vars(module)["forward"], "__func__", None) is type(module).forward


def unhook(module: nn.Module) -> None:
    """Takes accelerate's instance-level forward, or what its hooks left of one, off a module."""
    if "_hf_hook" in vars(module):
        for name in ("_hf_hook", "_old_forward", "forward"):
            vars(module).pop(name, None)
    if "forward" in vars(module) and own_forward(module):
        del vars(module)["forward"]


def become(module: nn.Module, cls: Class) -> None:
    """Gives a module another class, and accelerate's instance-level forward that class's."""
    if "forward" in vars(module) and own_forward(module):
        del vars(module)["forward"]
    module.__class__ = cls
    if hooked(module):
        vars(module)["_old_forward"] = types.MethodType(type(module).forward, module)
