"""Language models as one file that runs without their Python code.

A program (``torch.export``) or a package compiled ahead of time (AOTInductor) of

    (input_ids, attention_mask) → logits

for any batch and length: tensors alone, so neither needs transformers where it runs. A merged model
needs no oftfx there either; an adapted one needs ``import oftfx`` first, which defines the ops of
its rotations.
"""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from oftfx.capture import unwrap
from oftfx.errors import CaptureError
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


def program(model: nn.Module) -> ExportedProgram:
    """The exported program of a causal language model.

    Args:
        model: A transformers model, plain, merged or adapted. It is put in evaluation mode.

    Returns:
        A program of ``input_ids`` and ``attention_mask``, both (batch, sequence) int64, to the
        logits (batch, sequence, vocabulary) in the model's dtype. Batch and sequence are dynamic.

    Raises:
        CaptureError: The model gives no logits, or its code fixes the batch or the sequence.
    """
    inner = unwrap(model)
    device = next(inner.parameters()).device
    ids = torch.ones(_BATCH, _LENGTH, dtype=torch.long, device=device)
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    try:
        with waiting(f"exporting {type(inner).__name__}"), torch.no_grad():
            return torch.export.export(
                _Logits(inner).eval(), (ids, torch.ones_like(ids)), dynamic_shapes=(sizes, sizes)
            )
    except Exception as error:  # the model's own code runs: anything can come out
        raise CaptureError(
            f"{type(inner).__name__} cannot be exported as a program of input_ids and "
            f"attention_mask with any batch and length: {error}"
        ) from error


def export(
    model: nn.Module, file: str | os.PathLike[str], format: Literal["pt2", "aoti"] = "pt2"
) -> None:
    """Writes a causal language model as one file.

    Args:
        model: As for [`program`][oftfx.export.program].
        file: Its name ends in ``.pt2``. It appears whole or not at all.
        format: ``"pt2"`` for ``torch.export.load``; ``"aoti"`` for
            ``torch._inductor.aoti_load_package``, compiled for this machine's CPU (a C++ compiler
            is needed here, not where it runs).

    Raises:
        CaptureError: As for [`program`][oftfx.export.program]; or the model is to be compiled and
            not on the CPU.
        ValueError: ``format`` is neither, or ``file`` ends in something else.
    """
    path = Path(file)
    if format not in _WRITERS:
        raise ValueError(f"format={format!r}: must be 'pt2' or 'aoti'.")
    if path.suffix != ".pt2":
        raise ValueError(f"{path}: the name of an exported file ends in .pt2.")
    device = next(unwrap(model).parameters()).device
    if format == "aoti" and device.type != "cpu":
        raise CaptureError(f"a package is compiled for the CPU, and the model is on {device}.")
    exported = program(model)
    # torch looks at the ending of the temporary name too.
    fresh = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with waiting(f"writing {path.name}" if format == "pt2" else f"compiling {path.name}"):
            _WRITERS[format](exported, fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _compile(exported: ExportedProgram, file: Path) -> None:
    # Under no_grad: the model's own parameters may still ask for gradients.
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported, package_path=str(file))


_WRITERS: dict[str, Any] = {"pt2": torch.export.save, "aoti": _compile}
