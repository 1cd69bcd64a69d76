"""Rotations → weights: ``W ← W Mᵀ``, block by block, and what that cost.

    before                          after
    x_r = rotate(x, core)           y = linear(x, W', b)      W' = W·blockdiag(I + C_i)ᵀ
    y   = linear(x_r, W, b)

The fold is the rotation itself, applied to the rows of W with the cores transposed, so nothing of
the size in×in ever exists. Two adapters x·R1·R2 fold in reverse, W·R2ᵀ·R1ᵀ.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeVar, overload

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from oftfx import modules
from oftfx.adapter import named_parameters
from oftfx.capture import unwrap
from oftfx.errors import MergeError, OftfxWarning
from oftfx.fold.graph import merge_graph
from oftfx.fold.module import merge_module
from oftfx.fold.options import Options
from oftfx.fold.report import MergedSite, MergeReport
from oftfx.host import host_of
from oftfx.inserted import inserted
from oftfx.spread import is_sharded

__all__ = ["MergeReport", "MergedSite", "merge"]

M = TypeVar("M", nn.Module, ExportedProgram)


@overload
def merge(
    model: M,
    report: Literal[False] = False,
    *,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
) -> M: ...
@overload
def merge(
    model: M,
    report: Literal[True],
    *,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
) -> tuple[M, MergeReport]: ...
def merge(
    model: M,
    report: bool = False,
    *,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
) -> M | tuple[M, MergeReport]:
    """Folds the adapters in use into the weights and gives a plain model back.

    Those that are not folded go as well, with a warning: save them before.

    A tied weight that only one of its users rotates gets a tensor of its own; a transformers model
    then forgets the tie in its config, so that saving keeps both.

    A model with rotated quantised layers becomes an ordinary float one: each quantised layer,
    adapted or not, becomes an `nn.Linear`, and a transformers model forgets its quantisation. In a
    graph each 4-bit matmul becomes an ordinary one in the dtype of its input. One layer at a time
    is held in float32.

    Args:
        model: An adapted nn.Module or GraphModule, merged in place; or an ExportedProgram, of
            which a merged copy is returned.
        report: Also measure what it cost.
        names: The adapters to fold, in the order x meets them; None for those in use. A graph's are
            all folded, in the order they have in it.
        dtype: Of a model with quantised layers: the dtype of all its parameters afterwards, of a
            graph that of those that were quantised; bfloat16 for None. A float model keeps the
            dtypes it has.
        requantize: Store what was folded in the format its layer has now. Rounding takes part of
            the adaptation away again, all of it where the rotations are small; the report says how
            much survived.

    Raises:
        PlanError: The model has no adapter of a name in ``names``.
        MergeError: There is nothing to merge, or a weight or rotation cannot be folded (on
            `meta`, not finite, of a library that cannot dequantise), or ``dtype`` or
            ``requantize`` do not fit the model, or it is sharded over processes. The model is
            untouched.

    Warns:
        OftfxWarning: The model, or a part of it, held adapters that were not folded, and are
            gone; or requantising rounded most of the adaptation away.
    """
    inner, options = unwrap(model), Options(dtype, requantize)
    merged: Any
    if isinstance(inner, (fx.GraphModule, ExportedProgram)):
        _check(inner, named_parameters(inner))
        folded = list(dict.fromkeys(found.adapter for found in inserted(host_of(inner))))
        if names is not None and list(names) != folded:
            raise MergeError(
                f"names={list(names)}: a graph folds all it holds, which is {folded}, in this "
                "order: oftfx.remove the others before, or merge the nn.Module."
            )
        merged, costs = merge_graph(inner, report, options)
    else:
        known = modules.in_order(inner)
        _check(inner, known)
        used = [name for name in known if known[name]]
        folded = used if names is None else modules.chosen(inner, names)
        if not folded:
            raise MergeError(f"nothing to merge: {modules.absent(inner)}")
        dropped = known.keys() - set(folded)
        if names is None:
            dropped |= _idle(inner)
        with nullcontext() if names is None else modules.kept(inner):
            if names is not None:
                modules.select(inner, folded)
            merged, costs = merge_module(inner, report, options)
        if dropped:
            warnings.warn(
                f"merge: {folded} is folded where it is in use, and {sorted(dropped)} is gone "
                "from the model: oftfx.save what is to be kept before merging, and oftfx.remove "
                "the rest.",
                OftfxWarning,
                stacklevel=2,
            )
    result = merged if isinstance(model, ExportedProgram) else model
    return (result, MergeReport(tuple(costs), tuple(folded))) if report else result


def _idle(model: nn.Module) -> set[str]:
    """The adapters that are not in use, in a part of the model or all of it."""
    return {adapter for adapter, _, state in modules.holders(model) if not state.enabled}


def _check(model: nn.Module | ExportedProgram, adapted: Mapping[str, object]) -> None:
    """That there is something to merge, and that this process has all of it.

    Raises:
        MergeError: There is not, or the model is sharded.
    """
    if not adapted:
        raise MergeError(f"nothing to merge: {type(model).__name__} has no adapter.")
    if is_sharded(model):
        raise MergeError(
            "this model is sharded over processes: save the adapter, load it on the base in one "
            "process, and merge that."
        )
