"""What a transformers model remembers of its quantisation."""

import functools
from typing import Any

from torch import nn


def allow_training(model: nn.Module) -> None:
    """Lets Trainer train adapters on a quantised base, which it allows for those of PEFT alone."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_qat_trainable:
        base: Any = type(quantizer)  # type checkers take classes for unhashable
        quantizer.__class__ = _trainable(base)


@functools.cache
def _trainable(base: Any) -> Any:
    """The subclass of a quantizer's class that says its model can be trained."""

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuild, (base,), vars(self)

    body = {"is_qat_trainable": True, "is_trainable": True, "oft_base": base}
    body |= {"__reduce_ex__": reduce, "__module__": base.__module__}
    return type(base.__name__, (base,), body)


def _rebuild(base: Any) -> Any:
    cls = _trainable(base)
    return cls.__new__(cls)


def forbid_training(model: nn.Module) -> None:
    """Undoes `allow_training`."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and hasattr(quantizer, "oft_base"):
        quantizer.__class__ = quantizer.oft_base


def forget_quantisation(model: nn.Module) -> None:
    """Makes a model whose layers are floats again an ordinary one, to save and load as such."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    quantizer.remove_quantization_config(model)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(flag, None)
