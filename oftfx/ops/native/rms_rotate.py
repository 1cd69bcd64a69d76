"""Gradients of rotations of an RMSNorm, which is made where it is used, and of what was normed."""

import torch
from torch import Tensor

from oftfx.ops.native import rotate_group
from oftfx.ops.native.rotate_group import Strided


def fits(x: Tensor, cores: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether the kernels take these: what `rotate_group`'s do, each block with a core."""
    n, b, _ = cores[0].shape
    return dtype is torch.float32 and x.shape[-1] == n * b and rotate_group.fits(x, cores)


def rms_rotate_grad(
    grads: list[Tensor],
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    cores: list[Tensor],
    need_cores: bool,
) -> tuple[Tensor, list[Tensor]]:
    """`oftfx::rms_rotate_grad`, from one reading of the gradients and x."""
    held = [(rstd.to(x.dtype).contiguous(), (1, 0))]
    if weight is not None:
        held.append((weight.to(x.dtype).contiguous(), (0, 1)))
    factors: list[Strided] = [(factor.data_ptr(), *steps) for factor, steps in held]
    return rotate_group.rotate_group_grad(grads, x, cores, True, need_cores, factors, normed=True)
