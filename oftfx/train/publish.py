"""Folding a model into an ordinary directory, and checking it from a process without oftfx."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

import oftfx
from oftfx.errors import MergeError
from oftfx.sites import quantised_layers
from oftfx.train.errors import OutputError
from oftfx.train.output import writing
from oftfx.train.report import Reload

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What rounding every folded weight to its dtype may move the largest logits by.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def publish(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    out: Path,
    dtype: str = "auto",
    shard_size: str | None = None,
) -> "oftfx.MergeReport":
    """Folds the rotations in and writes a model directory that needs no oftfx.

    Args:
        model: An adapted model; afterwards a plain one.
        tokenizer: The model's own, written beside it.
        out: The directory to write.
        dtype: Of what a quantised model becomes, ``"auto"`` for bfloat16; a float one keeps its
            own.
        shard_size: The largest file of weights, such as ``"5GB"``; None for transformers' own.

    Raises:
        MergeError: A rotation cannot be folded.
        OutputError: ``shard_size`` is no size, and the model is untouched; or the directory cannot
            be written.
    """
    if shard_size is not None and not re.fullmatch(r"[1-9]\d*[KMGT]B", shard_size):
        raise OutputError(f"shard_size={shard_size!r}: write it as 500MB or 5GB.")
    chosen = None if dtype == "auto" or not quantised_layers(model) else getattr(torch, dtype)
    merged, report = oftfx.merge(model, report=True, dtype=chosen)
    with writing(out):
        merged.save_pretrained(out, **({"max_shard_size": shard_size} if shard_size else {}))
        tokenizer.save_pretrained(out)
    return report


def reload(
    out: Path,
    ids: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    computed: torch.dtype,
    device: str,
) -> Reload:
    """Loads a model directory in a new process, where oftfx cannot be imported.

    Args:
        out: What [`publish`][oftfx.train.publish.publish] wrote.
        ids: Tokens to compare on, ``(batch, seq)``.
        expected: The adapted model's logits on them, ``(batch, seq, vocab)``.
        dtype: Of the model's weights; decides what difference is mere rounding.
        computed: What the adapted model computed in, as the merged one does here: bfloat16 weights
            of a base that computed in float32 are told from what bfloat16 costs by itself.
        device: Where to run, as the expected logits' difference depends on it.

    Raises:
        MergeError: The directory does not load as a plain model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe.safetensors"
        save_file({"ids": ids, "logits": expected}, probe)
        script = Path(__file__).with_name("reload.py")
        kind = str(computed).removeprefix("torch.")
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(out), str(probe), kind, device],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        raise MergeError(
            f"{out} was written but does not load without oftfx:\n{done.stderr.strip()[-2000:]}"
        )
    return Reload(**json.loads(done.stdout.splitlines()[-1]), tolerance=TOLERANCE.get(dtype, 1e-4))
