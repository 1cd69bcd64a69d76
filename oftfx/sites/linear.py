"""`torch.nn.Linear`: weight stored (out, in)."""

from typing import Any

import torch
from torch import Tensor, nn

from oftfx.ops.cost import ALL, fold_from
from oftfx.ops.folded_linear import folded_linear
from oftfx.ops.frozen_linear import frozen_linear, served
from oftfx.readers import autocast_dtype, plain
from oftfx.sites.matmul import Layout
from oftfx.sites.naming import class_of
from oftfx.through import known

KIND = "linear"
CLASS = "torch.nn.modules.linear.Linear"
LAYOUT: Layout = "out_in"
DEFERS = False


def owns(module: nn.Module) -> bool:
    """Whether the module multiplies as a Linear does.

    A subclass with a forward of its own may read its input twice, so its weight is folded on the
    fly instead.
    """
    return isinstance(module, nn.Linear) and class_of(module).forward is nn.Linear.forward


def fuses(
    module: Any, x: Tensor, dtype: torch.dtype, block: int | None, outs: tuple[int, ...]
) -> bool:
    """Whether its weight can be folded, and that costs less than rotating so many rows."""
    least = None if block is None else fold_from(outs, block, dtype, x.device)
    if least is None or x.numel() < least * x.shape[-1]:
        return False
    if least > ALL and known(x) is not None:
        return False  # behind a folded weight a backward would not go on through what made x
    weight, bias = module.weight, module.bias
    return (
        all(plain(tensor) for tensor in (x, weight, bias) if tensor is not None)
        and not weight.requires_grad
        and (weight.dtype == dtype or autocast_dtype(x) is not None)
    )


def rotated_linear(module: Any, x: Tensor, core: Any, deferred: bool) -> Tensor:
    """The layer's output for ``x·blockdiag(I + C_1 … I + C_n)``."""
    return folded_linear(x, core, module.weight, module.bias)


def multiplied(module: Any, x: Tensor) -> Tensor | None:
    """The layer's output, where a gradient by another library is faster than PyTorch's choice."""
    weight, bias = module.weight, module.bias
    if weight.requires_grad or not (plain(weight) and served(weight)):
        return None
    return frozen_linear(x, weight, bias) if bias is None or plain(bias) else None
