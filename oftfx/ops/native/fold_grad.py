"""The gradient of a folded weight's core, with neither a transpose nor a solve apart."""

import torch
from torch import Tensor

from oftfx.ops.native.binding import call
from oftfx.ops.native.fold import sizes
from oftfx.ops.native.rotate_group import LARGEST, STEP


def fits(dtype: torch.dtype, block: int) -> bool:
    """Whether the kernel takes these: float32, and blocks of a width that pays."""
    return dtype == torch.float32 and block % STEP == 0 and block <= LARGEST


def core_grad(grad: Tensor, x: Tensor, core: Tensor) -> Tensor:
    """``x_iᵀ grad_i (I + C_i)⁻ᵀ`` of each block over all rows, (n, b, b)."""
    given, (grad, x, core) = core, (t.to(x.dtype).contiguous() for t in (grad, x, core))
    out = torch.empty_like(core)
    operands = (grad.data_ptr(), x.data_ptr(), core.data_ptr(), out.data_ptr())
    call("fold_grad", *sizes(x, core), *operands)
    return out.to(given.dtype)
