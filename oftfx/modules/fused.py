"""Layers that multiply in an op of oftfx: by a weight that it turns, or for a cheaper gradient."""

from typing import Any

import torch
from torch import Tensor

from oftfx.modules.rotation import Rotation, SharedRotation
from oftfx.ops.cost import folds_packed
from oftfx.ops.define import unheard
from oftfx.ops.frozen_linear import gains
from oftfx.readers import autocast_dtype, deferred_through, matmul_dtype, plain, rotated_through
from oftfx.sites.quantised import Fusing


def fused(module: Any, layers: Fusing, turns: list[Any], x: Tensor) -> Tensor | None:
    """A layer's output where it turns its weight instead of x, in a training step; else None."""
    if len(turns) != 1 or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    turn = turns[0]
    if getattr(turn, "rotated", None) == x.shape or (found := foldable(turns)) is None:
        return None
    (block, outs), dtype = found, matmul_dtype(x)
    if not layers.fuses(module, x, dtype, block, outs):
        vars(turn)["rotated"] = x.shape  # a module's own way of setting attributes is slow
        return None
    if turn.readers is not None and layers.DEFERS:
        same, own = turn.readers.defer(turn, x)
        return layers.rotated_linear(module, same, own, deferred=True)
    (factor,) = turn.applied()
    core: Tensor = factor.operands[0]
    if layers.DEFERS:
        folds = folds_packed(x.shape[:-1].numel(), turn.out, core.shape[-1], x.device)
        given = (deferred_through if folds else rotated_through)(x, [core], dtype)
        if given is not None:
            left = core.detach() if folds else None
            return layers.rotated_linear(module, given[0], left, deferred=True)
    return layers.rotated_linear(module, x.to(dtype), core, deferred=False)


def foldable(turns: list[Any]) -> tuple[int, tuple[int, ...]] | None:
    """The width of the blocks that a layer's weight can be turned by, if it can.

    Args:
        turns: What the layer has in use.

    Returns:
        That width, and how many outputs each layer has that turns its weight for the same x; none
        where they share a rotation.
    """
    if len(turns) != 1 or not isinstance(turns[0], (Rotation, SharedRotation)):
        return None  # a calibration's probe wants to see x
    turn = turns[0]
    block, readers = turn.rotation.block, turn.readers
    if block is None or turn.outputs or not (readers is None or readers.blocks):
        return None
    return block, (turn.out,) if readers is None else readers.outs


def multiplied(module: Any, layers: Fusing, x: Tensor) -> Tensor | None:
    """A layer's output for a turned x, where its product has a cheaper gradient; else None."""
    if torch.compiler.is_compiling() or not gains(x):  # which is nothing to ask of a GPU's x
        return None
    if not (x.requires_grad and torch.is_grad_enabled() and unheard()):
        return None
    return layers.multiplied(module, x) if autocast_dtype(x) is None and plain(x) else None
