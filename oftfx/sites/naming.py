"""What a module is, told by names, so that no library is imported to ask."""

import re

from torch import fx, nn


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class before it was adapted."""
    # Not of the module itself, whose own lookup takes longest for what is not there.
    cls: type[nn.Module] = getattr(type(module), "oft_base", type(module))
    return cls


def forward_of(module: nn.Module) -> str:
    """Qualified name of the forward that the module's class had before it was adapted."""
    return forward_in(class_of(module))


def forward_in(cls: type[nn.Module]) -> str:
    """Qualified name of a class's forward."""
    forward = cls.forward
    return f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"


def is_a(module: nn.Module, name: str) -> bool:
    """Whether the module's class, or one it derives from, has this qualified name."""
    classes = class_of(module).__mro__
    return any(f"{cls.__module__}.{cls.__qualname__}" == name for cls in classes)


def caller(node: fx.Node) -> str:
    """Fqn of the module whose code made this node, or as much of its end as the tracer knew."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    path = re.sub(r"^L\['?\w+'?\]\.?", "", path)  # Dynamo names the frame's local first
    path = re.sub(r"\['?(\w+)'?\]", r".\1", path)
    path = path.removeprefix("_export_root")  # a strict export's, inside its regions
    return re.sub(r"@\d+$", "", path).lstrip(".")  # export numbers repeated calls
