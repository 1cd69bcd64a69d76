"""`oftfx.compile(model)`: one compiled graph that all of a model's layers share.

    before                          after
    layers.0 … layers.27, eager     layers.0 … layers.27, each compiled by backend="oftfx"

Compiling a whole model takes time in proportion to its depth, compiling the layer that it repeats
does not: Dynamo finds the code that it compiled for the first layer under every other one.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from oftfx.capture import unwrap
from oftfx.errors import PlanError
from oftfx.health import rotations_of
from oftfx.modules import CHILD, Adapted, Rotation

M = TypeVar("M", bound=nn.Module)

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
"""What holds a model's layers; the children of any other module play parts of their own."""
OURS = ("G['__import_oftfx_dot_", "G['__builtins_dict__")
"""In Dynamo's names of what it found in our modules, and in Python's builtins."""
HELD = f"._modules['{CHILD}']"
"""In its names of what an adapted module holds."""
CONTAINERS = (HELD, "._modules", "._parameters", ".outputs")
"""How its names of what modules keep things in end there, which is never of another type."""
DEFAULTS = ("['oft_rows']", "['oft_order']", "['scaling']")
"""How its names of our classes' own values end, which instances may have others for."""


def compile(
    model: M,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> M:
    """Compiles an adapted model in place, with ``backend="oftfx"``: each of its repeated layers.

    Repeated are the layers of a list of which at least two are built alike; the rest of the model
    stays as it is. A model without any is compiled whole.

    A layer that keeps keys and values in a cache is compiled for each of its places there: train
    with ``use_cache=False``.

    Args:
        model: An adapted nn.Module or GraphModule.
        fullgraph: As for ``torch.compile``, of each layer.
        dynamic: As for ``torch.compile``.
        mode: As for ``torch.compile``.
        options: As for ``torch.compile``, with or without a mode; ``{"group": False}`` leaves a
            pass of oftfx out.

    Returns:
        The same object.

    Raises:
        PlanError: The model has no adapter, or is an ExportedProgram.
    """
    from oftfx.backend import oftfx  # brings the compiler, which importing oftfx does not

    inner = unwrap(model)
    if isinstance(inner, ExportedProgram):
        raise PlanError("an ExportedProgram is not compiled: oftfx.compile(program.module()).")
    rotations_of(inner)
    found = list(layers(inner)) or [inner]
    _allow_recompiles(len(found))
    # torch.compile takes no options besides a mode, which stands for some.
    settings = {**(torch._inductor.list_mode_options(mode) if mode else {}), **(options or {})}
    for layer in found:
        given = {"guard_filter_fn": _guarded, **settings}  # it takes the filter out of each
        layer.compile(backend=oftfx, fullgraph=fullgraph, dynamic=dynamic, options=given)
    return model


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers of a model that hold rotations, the outermost ones."""
    if isinstance(model, fx.GraphModule):  # whose forward calls its children's parts, not them
        return
    for module in model.children():
        repeated = list(_rotating(module)) if isinstance(module, LISTS) else []
        if len({_structure(layer) for layer in repeated}) < len(repeated):
            yield from repeated
        else:
            yield from layers(module)


def _rotating(container: nn.Module) -> Iterator[nn.Module]:
    """The children that hold adapted modules; an adapted one alone is too little to compile."""
    for child in container.children():
        inside = (isinstance(module, Adapted) for module in child.modules())
        if not isinstance(child, (Adapted, nn.ModuleList, nn.ModuleDict)) and any(inside):
            yield child


def _structure(layer: nn.Module) -> Any:
    """Equal for layers of the same modules and shapes."""
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    return modules, tuple((name, p.shape) for name, p in layer.named_parameters())


def _guarded(guards: Sequence[Any]) -> list[bool]:
    """Which of a layer's guards Dynamo is to check at every call: not those on our own code.

    Nobody redefines a function or a constant of ours, or of Python. To ask each whether it is what
    it was took a fifth of the time of all guards; to ask what a rotation's class says, a third of
    what was left of a look-up.
    """
    return [not _is_ours(guard) for guard in guards]


def _is_ours(guard: Any) -> bool:
    """Whether it asks of what only our own code could change, and does not."""
    if any(text in guard.name for text in OURS):
        return True
    if ".__mro__[" in guard.name and guard.name.endswith(DEFAULTS):
        return True
    if HELD not in guard.name:
        return False
    if guard.guard_type == "NOT_PRESENT_IN_GENERIC_DICT":  # may hide what the class defines
        attribute = guard.orig_guard.create_fn.keywords["attr"]
        return attribute != "forward" and callable(getattr(Rotation, attribute, None))
    return guard.guard_type == "TYPE_MATCH" and guard.name.endswith(CONTAINERS)


def _allow_recompiles(layers: int) -> None:
    """Lets each layer have the graphs that Dynamo allows one function.

    It counts them by code, which the layers share, and leaves what is beyond the limit eager.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * layers)
    config.accumulated_recompile_limit = max(
        config.accumulated_recompile_limit, config.recompile_limit
    )
