"""`oftfx::norm_rotate`: a normalised tensor turned by several cores, and never written itself.

The norm's statistics come from outside. There the compiler computes them in the kernel that writes
x, and adds their gradients where it adds the residual's; here they are one number a row. What the
backward keeps is x, which a frozen model keeps for its norm as well, those numbers and the cores.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oftfx.ops.define import LIBRARY, below, define, differentiate
from oftfx.ops.kernels import kernels
from oftfx.ops.precision import as_given
from oftfx.ops.rotate_group import rotate_group, rotate_group_grad


def norm_rotate(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cores: list[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """[`rotate_group`][oftfx.ops.rotate_group] of ``(x − mean)·rstd·weight + bias``.

    The norm is computed in float32 (float64 of a float64 x) and rounded once, to ``dtype``; models
    that round between its steps get that much nearer to the exact norm.

    Args:
        x: (..., n·b), floating.
        mean: (..., 1), of each row; None subtracts nothing, as in an RMSNorm.
        rstd: (..., 1), by what each row is multiplied.
        weight: (n·b,), by what each column is multiplied; None for ones.
        bias: (n·b,), what is added to each row; None for zeros.
        cores: Each (n, b, b), of one shape.
        dtype: What the norm is rounded to before it is rotated.

    Returns:
        For each core, (..., n·b) in ``dtype``, contiguous.

    Raises:
        RuntimeError: The width of x is not n·b.
    """
    result: list[Tensor] = NORM_ROTATE(x, mean, rstd, weight, bias, cores, dtype)
    return result


@as_given
def _norm_rotate(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cores: list[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    fast = kernels("norm_rotate", x.device)
    if fast is None or not fast.fits(x, cores, dtype):
        return rotate_group(_norm(x, mean, rstd, weight, bias, dtype), cores)
    with torch.cuda.device_of(x):
        result: list[Tensor] = fast.norm_rotate(x, mean, rstd, weight, bias, cores, dtype)
    return result


NORM_ROTATE = define(
    "norm_rotate(Tensor x, Tensor? mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "Tensor[] cores, ScalarType dtype) -> Tensor[]",
    _norm_rotate,
)


@torch.library.register_fake("oftfx::norm_rotate", lib=LIBRARY)
def _(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cores: list[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    return [x.new_empty(x.shape, dtype=dtype) for _ in cores]


def norm_rotate_grad(
    grads: list[Tensor],
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cores: list[Tensor],
    need_x: bool,
    need_affine: bool,
    need_cores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of [`norm_rotate`][oftfx.ops.norm_rotate]; what is not needed comes back empty.

    Args:
        grads: For each core, the gradient of what it turned the norm to, (..., n·b).
        x: As for `norm_rotate`, as are those that follow.
        mean: (..., 1) or None.
        rstd: (..., 1).
        weight: (n·b,) or None.
        bias: (n·b,) or None.
        cores: Each (n, b, b).
        need_x: Whether the gradients of x, the mean and rstd are wanted.
        need_affine: Whether those of weight and bias are wanted.
        need_cores: Whether those of the cores are wanted.

    Returns:
        Of x, mean, rstd, weight and bias, and of each core, in its dtype and shape; of x with the
        statistics held fixed.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]] = NORM_ROTATE_GRAD(
        grads, x, mean, rstd, weight, bias, cores, need_x, need_affine, need_cores
    )
    return result


def _norm_rotate_grad(
    grads: list[Tensor],
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cores: list[Tensor],
    need_x: bool,
    need_affine: bool,
    need_cores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    fast = kernels("norm_rotate", x.device)
    if need_affine or fast is None or not fast.fits(x, cores, grads[0].dtype, grads):
        return _composed(grads, x, mean, rstd, weight, bias, cores, need_x, need_affine, need_cores)
    with torch.cuda.device_of(x):
        grad_x, grad_mean, grad_rstd, grad_cores = fast.norm_rotate_grad(
            grads, x, mean, rstd, weight, bias, cores, need_x, need_cores
        )
    return grad_x, grad_mean, grad_rstd, x.new_empty(0), x.new_empty(0), grad_cores


def _composed(
    grads: list[Tensor],
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cores: list[Tensor],
    need_x: bool,
    need_affine: bool,
    need_cores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    grad_x, grad_mean, grad_rstd, grad_weight, grad_bias = (x.new_empty(0) for _ in range(5))
    normed = _norm(x, mean, rstd, weight, bias, grads[0].dtype)
    need_norm = need_x or need_affine
    turned, grad_cores = rotate_group_grad(grads, normed, cores, need_norm, need_cores)
    wide = torch.promote_types(x.dtype, torch.float32)
    turned, rstd_wide = turned.to(wide), rstd.to(wide)
    centred = x.to(wide) if mean is None else x.to(wide) - mean
    if need_affine:
        if weight is not None:
            grad_weight = _columns(turned * centred * rstd_wide).to(weight.dtype)
        if bias is not None:
            grad_bias = _columns(turned).to(bias.dtype)
    if need_x:
        scaled = turned if weight is None else turned * weight
        grad_rstd = (scaled * centred).sum(-1, keepdim=True).to(rstd.dtype)
        scaled = scaled * rstd_wide
        grad_x = scaled.to(x.dtype)
        if mean is not None:
            grad_mean = -scaled.sum(-1, keepdim=True).to(mean.dtype)
    return grad_x, grad_mean, grad_rstd, grad_weight, grad_bias, grad_cores


NORM_ROTATE_GRAD = define(
    "norm_rotate_grad(Tensor[] grads, Tensor x, Tensor? mean, Tensor rstd, Tensor? weight, "
    "Tensor? bias, Tensor[] cores, bool need_x, bool need_affine, bool need_cores) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _norm_rotate_grad,
)


@torch.library.register_fake("oftfx::norm_rotate_grad", lib=LIBRARY)
def _(
    grads: list[Tensor],
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cores: list[Tensor],
    need_x: bool,
    need_affine: bool,
    need_cores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return x.new_empty(0)
        return tensor.new_empty(tensor.shape)

    return (
        like(x, need_x),
        like(mean, need_x),
        like(rstd, need_x),
        like(weight, need_affine),
        like(bias, need_affine),
        [core.new_empty(core.shape if need_cores else 0) for core in cores],
    )


def _norm(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``(x − mean)·rstd·weight + bias``, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(wide) if mean is None else x.to(wide) - mean
    normed = normed * rstd.to(wide)
    if weight is not None:
        normed *= weight
    if bias is not None:
        normed += bias
    return normed.to(dtype)


def _columns(x: Tensor) -> Tensor:
    """The sum of every column."""
    return x.reshape(-1, x.shape[-1]).sum(0)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        x: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *cores: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, mean, rstd, weight, bias, *cores)
        return tuple(below(NORM_ROTATE, x, mean, rstd, weight, bias, list(cores), dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, *cores = ctx.saved_tensors
        _, *wanted = ctx.needs_input_grad
        needs = any(wanted[:3]), any(wanted[3:5]), any(wanted[5:])
        *given, grad_cores = NORM_ROTATE_GRAD(
            list(grads), x, mean, rstd, weight, bias, cores, *needs
        )
        pairs = zip((*given, *grad_cores), wanted, strict=True)
        return None, *(grad if want else None for grad, want in pairs)


def _apply(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cores: list[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    return list(_NormRotate.apply(dtype, x, mean, rstd, weight, bias, *cores))


differentiate(NORM_ROTATE, _apply)
