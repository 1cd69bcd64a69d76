"""`oftfx::rms_rotate_grad`: gradients of rotations of an RMSNorm, down to what was normed.

    y = x·rstd·weight       rstd = (mean(x²) + ε)^−½ of each row
    y_i = rotate(y, C_i)
    dx, dC_i = rms_rotate_grad(dy_i, x, rstd, weight, C_i)

With ``dy = Σ rotate(dy_i, C_iᵀ)·weight`` it is ``dx = rstd·(dy − x·rstd²·mean(dy·x))``: PyTorch's
own backward takes about ten passes for that, after the rotations' gradients.
"""

import torch
from torch import Tensor

from oftfx.ops.define import LIBRARY, call, define, differentiate
from oftfx.ops.kernels import kernels, on
from oftfx.ops.norm_rotate import Norm, normed
from oftfx.ops.precision import exactly
from oftfx.ops.rotate_group import rotate_group_grad


def rms_rotate_grad(
    grads: list[Tensor],
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    cores: list[Tensor],
    need_cores: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of rotations of ``x·rstd·weight``, of x through rstd too.

    Args:
        grads: For each core, the gradient of what it turned the norm to, (..., n·b).
        x: (..., n·b), what was normed; of the gradients' dtype or a wider one.
        rstd: (..., 1), ``(mean(x²) + ε)^−½`` of each row.
        weight: (n·b,), by what each column was multiplied; None for ones.
        cores: Each (n, b, b), of one shape.
        need_cores: Whether their gradients are wanted.

    Returns:
        (..., n·b) in x's dtype; for each core (n, b, b), empty where not wanted.
    """
    result: tuple[Tensor, list[Tensor]] = call(
        RMS_ROTATE_GRAD, grads, x, rstd, weight, cores, need_cores
    )
    return result


def served(x: Tensor, cores: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether kernels do it, of gradients of this dtype; elsewhere it costs what its parts do."""
    fast = kernels("rms_rotate", x.device)
    return fast is not None and bool(fast.fits(x, cores, dtype))


def _rms_rotate_grad(
    grads: list[Tensor],
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    cores: list[Tensor],
    need_cores: bool,
) -> tuple[Tensor, list[Tensor]]:
    fast = kernels("rms_rotate", x.device)
    if fast is None or not fast.fits(x, cores, grads[0].dtype):
        return _in_parts(grads, x, rstd, weight, cores, need_cores)
    with on(x.device):
        result: tuple[Tensor, list[Tensor]] = fast.rms_rotate_grad(
            grads, x, rstd, weight, cores, need_cores
        )
    return result


def _in_parts(
    grads: list[Tensor],
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    cores: list[Tensor],
    need_cores: bool,
) -> tuple[Tensor, list[Tensor]]:
    with exactly(x.device):
        y = normed(x, Norm(None, rstd, weight), grads[0].dtype)
        turned, grad_cores = rotate_group_grad(grads, y, cores, True, need_cores)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        turned = turned.to(wide.dtype) if weight is None else turned * weight.to(wide.dtype)
        share = (turned * wide).mean(-1, keepdim=True) * rstd.square()
        return ((turned - wide * share) * rstd).to(x.dtype), grad_cores


RMS_ROTATE_GRAD = define(
    "rms_rotate_grad(Tensor[] grads, Tensor x, Tensor rstd, Tensor? weight, Tensor[] cores, "
    "bool need_cores) -> (Tensor, Tensor[])",
    _rms_rotate_grad,
)
differentiate(RMS_ROTATE_GRAD, _in_parts)


@torch.library.register_fake("oftfx::rms_rotate_grad", lib=LIBRARY)
def _(
    grads: list[Tensor],
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    cores: list[Tensor],
    need_cores: bool,
) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty(x.shape), [core.new_empty(core.shape if need_cores else 0) for core in cores]
