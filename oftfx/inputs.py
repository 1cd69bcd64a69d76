"""Example inputs for tracing a transformers model, from its own main input and config.

Only shapes matter: the tensors are on `meta`.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from oftfx.errors import CaptureError

_TOKENS = 8


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for one small forward of a transformers model.

    Raises:
        CaptureError: The model is no transformers model, or its main input is one whose shape the
            config does not tell.
    """
    main = getattr(model, "main_input_name", None)
    config = getattr(model, "config", None)
    if main is None or config is None:
        raise CaptureError(
            f"{type(model).__name__} is no transformers model, so its inputs are unknown: "
            "pass example_inputs (a tensor, a tuple of arguments, or a dict of keywords)."
        )
    build = _BUILDERS.get(main)
    if build is None:
        raise CaptureError(
            f"the main input of {type(model).__name__} is {main!r}, whose shape its config does "
            f"not tell: pass example_inputs={{{main!r}: …}}."
        )
    known = inspect.signature(model.forward).parameters
    value = build(config)
    if value.is_floating_point():
        value = value.to(next(model.parameters()).dtype)
    kwargs: dict[str, Any] = {main: value}
    towers = hasattr(config, "text_config") and hasattr(config, "vision_config")
    if towers and "pixel_values" in known and not getattr(model, "can_generate", bool)():
        # A contrastive pair of encoders needs both; a language model that sees can do without.
        kwargs["pixel_values"] = _pixels(config).to(next(model.parameters()).dtype)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in known:
        kwargs["decoder_input_ids"] = _tokens(config)
    if "use_cache" in known or "past_key_values" in known:
        # A cache is state of generation, not of the layers; without it the graph is half as long.
        kwargs["use_cache"] = False
    return kwargs


def _tokens(config: Any) -> Tensor:
    return torch.ones(1, _TOKENS, dtype=torch.long, device="meta")


def _pixels(config: Any) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return torch.ones(1, getattr(vision, "num_channels", 3), height, width, device="meta")


def _features(config: Any) -> Tensor:
    frames = 2 * getattr(config, "max_source_positions", 1500)
    return torch.ones(1, getattr(config, "num_mel_bins", 80), frames, device="meta")


def _waveform(config: Any) -> Tensor:
    return torch.ones(1, 16000, device="meta")


_BUILDERS = {
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _waveform,
}
