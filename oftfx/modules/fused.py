"""Layers that turn their weight instead of x, in the op that multiplies by it."""

from typing import Any

import torch
from torch import Tensor

from oftfx.modules.rotation import Rotation, SharedRotation
from oftfx.readers import autocast_dtype, cast
from oftfx.sites.quantised import Fusing


def fused(module: Any, layers: Fusing, turns: list[Any], x: Tensor) -> Tensor | None:
    """A layer's output where it turns its weight instead of x, in a training step; else None."""
    if len(turns) != 1 or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    turn = turns[0]
    if isinstance(turn, SharedRotation):
        rotation = turn.rotation
    elif isinstance(turn, Rotation):
        rotation = turn
    else:
        return None  # a calibration's probe wants to see x
    if turn.rotated == x.shape:
        return None
    readers = turn.readers
    if turn.outputs or rotation.block is None or not (readers is None or readers.blocks):
        return None
    outs = (turn.out,) if readers is None else readers.outs
    if not layers.fuses(module, x, autocast_dtype(x) or x.dtype, rotation.block, outs):
        vars(turn)["rotated"] = x.shape  # a module's own way of setting attributes is slow
        return None
    if readers is not None and layers.DEFERS:
        given, core = readers.defer(turn, x)
        return layers.rotated_linear(module, given, core, deferred=True)
    (factor,) = rotation.applied()
    return layers.rotated_linear(module, cast(x), factor.operands[0], deferred=False)
