"""A weight folded, and the gradient of its core: with neither a transpose nor a solve apart."""

import torch
from torch import Tensor

from oftfx.ops.native.binding import call
from oftfx.ops.native.rotate_group import LARGEST, STEP


def fits(dtype: torch.dtype, block: int) -> bool:
    """Whether the kernels take these: float32, and blocks of a width that pays."""
    return dtype == torch.float32 and block % STEP == 0 and block <= LARGEST


def folded(weight: Tensor, core: Tensor) -> Tensor:
    """``W blockdiag(I + C_1 … I + C_n)ᵀ``: the bits of rotating by the transposed cores."""
    weight, core = weight.contiguous(), core.to(weight.dtype).contiguous()
    out = torch.empty_like(weight)
    operands = (weight.data_ptr(), core.data_ptr(), out.data_ptr())
    call("fold", *_sizes(weight, core), *operands)
    return out


def core_grad(grad: Tensor, x: Tensor, core: Tensor) -> Tensor:
    """``x_iᵀ grad_i (I + C_i)⁻ᵀ`` of each block over all rows, (n, b, b)."""
    given, (grad, x, core) = core, (t.to(x.dtype).contiguous() for t in (grad, x, core))
    out = torch.empty_like(core)
    operands = (grad.data_ptr(), x.data_ptr(), core.data_ptr(), out.data_ptr())
    call("fold_grad", *_sizes(x, core), *operands)
    return out.to(given.dtype)


def _sizes(x: Tensor, core: Tensor) -> tuple[int, int, int, int]:
    n, b, _ = core.shape
    return 2 * x.numel() * b, x.numel() // (n * b) if n else 0, n, b
