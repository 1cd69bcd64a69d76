"""PyTorch's inference path of encoders, which reads the weights of layers and calls none.

Without gradients `nn.TransformerEncoderLayer` hands the weights of its linear layers to one kernel,
which knows nothing of rotations, and `nn.TransformerEncoder` packs padded rows for it. Each asks an
attribute of its own first.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from oftfx.modules import Adapted

OFF: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
"""The attribute that each asks, and what it does without the path for."""
HELD = "oft_fast_path"
"""Where a module keeps what that attribute was."""


def leave(model: nn.Module) -> None:
    """Has a model's encoders call their layers, if any of those is adapted."""
    if _is_adapted(model):
        # All of them: one beside it that took the path would hand on what others cannot read.
        for module, name, off in _encoders(model):
            vars(module).setdefault(HELD, getattr(module, name))
            setattr(module, name, off)


def restore(model: nn.Module) -> None:
    """Gives the path back to encoders of which none is adapted any more."""
    if not _is_adapted(model):
        for module, name, _ in _encoders(model):
            if HELD in vars(module):
                setattr(module, name, vars(module).pop(HELD))


def _encoders(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for module in model.modules():
        for cls, (name, off) in OFF.items():
            if isinstance(module, cls) and hasattr(module, name):
                yield module, name, off


def _is_adapted(model: nn.Module) -> bool:
    inside = (part for encoder, _, _ in _encoders(model) for part in encoder.modules())
    return any(isinstance(part, Adapted) for part in inside)
