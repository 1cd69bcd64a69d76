"""Language models as one file that runs without their Python code.

A program (``torch.export``) or a package compiled ahead of time (AOTInductor) of

    (input_ids, attention_mask) → logits        for any batch and length
    (input_ids, start) → next logits            one step of generation, with a static cache inside

Tensors alone and PyTorch's own ops: neither transformers nor oftfx is needed where it runs, be the
model merged or adapted.
"""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from oftfx.capture import unwrap
from oftfx.errors import CaptureError
from oftfx.files import replacing
from oftfx.lower import lower
from oftfx.progress import waiting

_BATCH, _LENGTH = 2, 8
"""Of the example; one of either would be taken for a constant."""


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # No cache: it is state of generation, and what comes out is tensors alone.
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits: Tensor = found.logits
        return logits


_KEPT = ("keys", "values", "cumulative_length")
"""The tensors of a cache's layer."""


class _Step(nn.Module):
    """The next token of one sequence; its keys and values are buffers, which every call fills."""

    def __init__(self, model: nn.Module, positions: int) -> None:
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

        super().__init__()
        config: Any = model.config
        self.model = model
        self.cache = StaticCache(config=config.get_text_config(), max_cache_len=positions)
        for index, layer in enumerate(self.cache.layers):
            # A window that slides takes control flow; its mask does the same on a whole cache.
            if type(layer) is StaticSlidingWindowLayer:
                self.cache.layers[index] = layer = StaticLayer(positions)
            if type(layer) is not StaticLayer:
                raise ValueError(f"layer {index} keeps a {type(layer).__name__}.")
        token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        model(input_ids=token, past_key_values=self.cache, use_cache=True)  # makes the tensors
        for index, layer in enumerate(self.cache.layers):
            for name in _KEPT:
                self.register_buffer(f"{name}_{index}", getattr(layer, name), persistent=False)

    def forward(self, input_ids: Tensor, start: Tensor) -> Tensor:
        for index, layer in enumerate(self.cache.layers):
            for name in _KEPT:  # a tracer knows a buffer by where it is read
                setattr(layer, name, getattr(self, f"{name}_{index}"))
            layer.cumulative_length.copy_(start)
        found = self.model(
            input_ids=input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = found.logits[:, -1]
        return logits


def program(model: nn.Module, cache: int | None = None) -> ExportedProgram:
    """The exported program of a causal language model, in PyTorch's own ops.

    Args:
        model: A transformers model, plain, merged or adapted. It is put in evaluation mode.
        cache: How many positions a static cache has; None for a program without one.

    Returns:
        A program of ``input_ids`` and ``attention_mask``, both (batch, sequence) int64, to the
        logits (batch, sequence, vocabulary) in the model's dtype. Batch and sequence are dynamic.
        With a cache: of ``input_ids`` (1, new), the next tokens of one sequence, and ``start`` (),
        how many came before, both int64, to the logits (1, vocabulary) behind the last of them. 0
        begins another sequence.

    Raises:
        CaptureError: The model gives no logits; or its code fixes the batch or the sequence; or it
            is to have a cache, and keeps more than keys and values.
    """
    inner = unwrap(model).eval()
    device = next(inner.parameters()).device
    try:
        with waiting(f"exporting {type(inner).__name__}"), torch.no_grad():
            if cache is None:
                ids = torch.ones(_BATCH, _LENGTH, dtype=torch.long, device=device)
                sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
                return _traced(_Logits(inner), (ids, torch.ones_like(ids)), (sizes, sizes))
            ids = torch.ones(1, min(_LENGTH, cache), dtype=torch.long, device=device)
            start = torch.zeros((), dtype=torch.long, device=device)
            return _traced(
                _Step(inner, cache), (ids, start), ({1: Dim("new", min=1, max=cache)}, {})
            )
    except Exception as error:  # the model's own code runs: anything can come out
        what = "input_ids and attention_mask with any batch and length"
        if cache is not None:
            what = "one step of generation with a static cache"
        raise CaptureError(
            f"{type(inner).__name__} cannot be exported as a program of {what}: {error}"
        ) from error


def _traced(module: nn.Module, example: tuple[Tensor, ...], sizes: Any) -> ExportedProgram:
    return lower(torch.export.export(module.eval(), example, dynamic_shapes=sizes))


def export(
    model: nn.Module,
    file: str | os.PathLike[str],
    format: Literal["pt2", "aoti"] = "pt2",
    cache: int | None = None,
) -> None:
    """Writes a causal language model as one file, which needs neither transformers nor oftfx.

    The file is a function of ``input_ids`` and ``attention_mask``, both (batch, sequence) int64, to
    the logits (batch, sequence, vocabulary), for any batch and length.

    With a ``cache``, it is one step of generation: a function of ``input_ids`` (1, new), the next
    tokens of one sequence, and ``start`` (), how many tokens came before them, to the logits
    (1, vocabulary) behind the last. Keys and values stay inside, up to ``cache`` positions, from
    call to call; ``start`` 0 begins another sequence.

    Args:
        model: A transformers model, plain, merged or adapted. It is put in evaluation mode. An
            adapted one is written with its rotations as constants beside the weights.
        file: Its name ends in ``.pt2``. It appears whole or not at all; its folder is made
            if missing.
        format: ``"pt2"`` for ``torch.export.load``; ``"aoti"`` for
            ``torch._inductor.aoti_load_package``, compiled for this machine's CPU (a C++ compiler
            is needed here, not where it runs).
        cache: How many positions its static cache has; None for no cache.

    Raises:
        CaptureError: The model gives no logits; or its code fixes the batch or the sequence; or it
            is to have a cache and keeps more than keys and values; or it is to be compiled and not
            on the CPU.
        ValueError: ``format`` is neither, ``file`` ends in something else, or ``cache`` < 2.
    """
    path = Path(file)
    if format not in _WRITERS:
        raise ValueError(f"format={format!r}: must be 'pt2' or 'aoti'.")
    if path.suffix != ".pt2":
        raise ValueError(f"{path}: the name of an exported file ends in .pt2.")
    if cache is not None and cache < 2:
        raise ValueError(f"cache={cache}: must be two positions or more, or None for no cache.")
    device = next(unwrap(model).parameters()).device
    if format == "aoti" and device.type != "cpu":
        raise CaptureError(f"a package is compiled for the CPU, and the model is on {device}.")
    path.parent.mkdir(parents=True, exist_ok=True)  # before the work that would be lost
    exported = program(model, cache)
    doing = "writing" if format == "pt2" else "compiling"
    with waiting(f"{doing} {path.name}"), replacing(path) as fresh:
        _WRITERS[format](exported, fresh)


def _compile(exported: ExportedProgram, file: Path) -> None:
    # Under no_grad: the model's own parameters may still ask for gradients.
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported, package_path=str(file))


_WRITERS: dict[str, Any] = {"pt2": torch.export.save, "aoti": _compile}
