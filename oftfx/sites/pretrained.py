"""What a transformers model remembers of its quantisation."""

import functools
from typing import Any

from torch import nn


def quantise(model: Any, double: bool = True) -> Any:
    """The NF4 model that loading a float transformers model's own files in 4 bits would give.

    For weights that come in no such files: a GGUF file's, random ones. The head stays as it is, and
    what is not quantised shares its storage with the model given.

    Args:
        model: A float transformers model; the result is on its device.
        double: Whether the blocks' scales are quantised as well.
    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=model.dtype,
    )
    quantised = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=model.dtype,
        device_map={"": model.device},
        quantization_config=config,
    )
    if model.can_generate():
        quantised.generation_config = model.generation_config
    return quantised


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
