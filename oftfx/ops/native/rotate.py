"""One rotation, and its gradients: a group of one."""

from torch import Tensor

from oftfx.ops.native import rotate_group


def fits(x: Tensor, core: Tensor, stride: int) -> bool:
    """Whether the kernels take these: blocks of neighbours."""
    return stride == 1 and rotate_group.fits(x, [core])


def rotate(x: Tensor, core: Tensor, stride: int) -> Tensor:
    """`oftfx::rotate`: x (..., n·b) and core (n, b, b) to a contiguous result."""
    (out,) = rotate_group.rotate_group(x, [core])
    return out


def rotate_grad(
    grad: Tensor, x: Tensor, core: Tensor, need_x: bool, need_core: bool, stride: int
) -> tuple[Tensor, Tensor]:
    """`oftfx::rotate_grad`: both gradients from one reading of ``grad`` and ``x``."""
    out, (gram,) = rotate_group.rotate_group_grad([grad], x, [core], need_x, need_core)
    return out, gram
