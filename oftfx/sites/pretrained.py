"""What a transformers model remembers of its quantisation."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def nf4(compute: torch.dtype, double: bool = True) -> Any:
    """What transformers is told to load a model in 4 bits.

    Args:
        compute: What the 4-bit layers multiply in.
        double: Whether the scales of the blocks are quantised as well.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


def quantise(model: Any, double: bool = True) -> Any:
    """The NF4 model that loading a float one from a directory of its own would give.

    For weights that lie in none: those of a GGUF file, or random ones. The output head stays as it
    is; what is not quantised shares its storage with the model given.

    Args:
        model: A float transformers model; the result is on its device.
        double: As for [`nf4`][oftfx.sites.pretrained.nf4].
    """
    quantised = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=model.dtype,
        device_map={"": model.device},
        quantization_config=nf4(model.dtype, double),
    )
    if model.can_generate():
        quantised.generation_config = model.generation_config
    return quantised


def models_in(module: nn.Module) -> Iterator[Any]:
    """The transformers models that a module is or holds, less those that they are made of."""
    if "config" in vars(module) and hasattr(type(module), "get_output_embeddings"):
        yield module
        return
    for child in module.children():
        yield from models_in(child)


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
    if read := getattr(model, "_weight_conversions", None):  # to be undone when it is saved
        vars(model)["_weight_conversions"] = [s for s in read if not _is_quantizers(s)]
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(flag, None)


def _is_quantizers(conversion: Any) -> bool:
    """Whether a step of reading a checkpoint is that of a quantizer, which none undoes."""
    return any(hasattr(each, "hf_quantizer") for each in getattr(conversion, "operations", ()))
