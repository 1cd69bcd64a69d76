"""`oftfx::scale`: a factor for each output of a matmul, and its gradients.

The factors are stored less one, so that zeros leave every bit of y as it is. A bias that the matmul
has added is not scaled.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from oftfx.ops.precision import as_given


@torch.library.custom_op("oftfx::scale", mutates_args=())
def scale(y: Tensor, magnitude: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045
    """``(y − bias)·diag(1 + m) + bias``, computed as ``y + (y·m − bias·m)``.

    Args:
        y: (..., out), floating.
        magnitude: m, (out,); computed with in y's dtype.
        bias: What of y is not scaled, of a shape that broadcasts to y's; None for nothing.

    Returns:
        (..., out) in y's dtype and with its strides.

    Raises:
        RuntimeError: The shapes do not fit.
    """
    return of_aten(y, magnitude, bias)


@as_given
def of_aten(y: Tensor, magnitude: Tensor, bias: Tensor | None) -> Tensor:
    """[`scale`][oftfx.ops.scale] of PyTorch's own ops."""
    _check(y, magnitude)
    m = magnitude.to(y.dtype)
    rest = y if bias is None else y - m * bias.to(y.dtype)
    return torch.addcmul(rest, y, m, out=torch.empty_like(y))


@scale.register_fake
def _(y: Tensor, magnitude: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045
    _check(y, magnitude)
    return torch.empty_like(y)


def _check(y: Tensor, magnitude: Tensor) -> None:
    torch._check(
        tuple(magnitude.shape) == tuple(y.shape[-1:]),
        lambda: (
            f"oftfx::scale: y of shape {tuple(y.shape)} and a magnitude of shape "
            f"{tuple(magnitude.shape)} do not fit: they must be (..., out) and (out,)."
        ),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of ops that autograd knows, so that it is differentiable in turn."""
    y, magnitude, bias = ctx.saved_tensors
    need_y, need_magnitude, need_bias = ctx.needs_input_grad
    scaled = grad * magnitude.to(grad.dtype)
    grad_y = grad + scaled if need_y else None
    grad_magnitude = grad_bias = None
    if need_magnitude:
        product = y if bias is None else y - bias.to(y.dtype)
        rows = (grad * product).reshape(-1, len(magnitude))
        wide = torch.promote_types(rows.dtype, torch.float32)
        grad_magnitude = rows.sum(0, dtype=wide).to(magnitude.dtype)  # rounded once, at the end
    if need_bias:
        grad_bias = -scaled.sum_to_size(bias.shape).to(bias.dtype)
    return grad_y, grad_magnitude, grad_bias


scale.register_autograd(_backward, setup_context=_save)
