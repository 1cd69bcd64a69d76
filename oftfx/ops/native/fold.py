"""A float32 weight folded without a transpose of its cores apart."""

import torch
from torch import Tensor

from oftfx.ops.native.binding import call
from oftfx.ops.native.rotate_group import LARGEST, STEP


def fits(weight: Tensor, core: Tensor) -> bool:
    """Whether the kernel takes these: float32, if only of one, and blocks of a width that pays."""
    block = core.shape[-1]
    wide = torch.promote_types(weight.dtype, core.dtype)
    return wide == torch.float32 and block % STEP == 0 and block <= LARGEST


def folded(weight: Tensor, core: Tensor, dtype: torch.dtype, into: Tensor | None) -> Tensor:
    """``W blockdiag(I + C_1 … I + C_n)ᵀ`` in a dtype, as rotating by the transposed cores."""
    weight, core = weight.float().contiguous(), core.float().contiguous()
    out = torch.empty_like(weight)
    operands = (weight.data_ptr(), core.data_ptr(), out.data_ptr())
    call("fold", *sizes(weight, core), *operands)
    return out.to(dtype) if into is None else into.copy_(out)


def sizes(x: Tensor, core: Tensor) -> tuple[int, int, int, int]:
    """What a kernel is told of rows (…, n·b) and cores (n, b, b)."""
    n, b, _ = core.shape
    return 2 * x.numel() * b, x.numel() // (n * b) if n else 0, n, b
