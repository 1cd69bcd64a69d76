"""`oftfx::int8_linear`: bitsandbytes' matmul by rows of int8, and the gradient its layers give.

A layer's own autograd function runs several ops, and no graph of them has that gradient: rounding x
to int8 has none.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("oftfx::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    rows: Tensor,
    shape: list[int],
    scales: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    threshold: Optional[float],  # noqa: UP045
) -> Tensor:
    """``x·Wᵀ + bias`` for ``W = diag(scales/127)·rows``, with the bits of `Linear8bitLt`.

    Args:
        x: (..., in), floating; two-dimensional where it is rounded.
        rows: (out, in), int8.
        shape: Of the rows: (out, in).
        scales: (out,), float32.
        bias: (out,).
        threshold: None multiplies by W in x's dtype. Else x is rounded to int8, row by row, but for
            the columns where a number reaches this threshold; 0 rounds them all.

    Returns:
        (..., out) in x's dtype.
    """
    return of_bitsandbytes(x, rows, shape, scales, bias, threshold)


def of_bitsandbytes(
    x: Tensor,
    rows: Tensor,
    shape: list[int],
    scales: Tensor,
    bias: Tensor | None,
    threshold: float | None,
) -> Tensor:
    """[`int8_linear`][oftfx.ops.int8_linear] of bitsandbytes' and PyTorch's own ops."""
    if threshold is None:
        return F.linear(x, _floats(rows, scales, x.dtype), bias)
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

    library = torch.ops.bitsandbytes
    numbers, largest, columns = library.int8_vectorwise_quant(x.to(torch.float16), threshold)
    if threshold == 0.0:
        y: Tensor = library.int8_scaled_mm(numbers, rows, largest, scales, bias, x.dtype)
    else:
        y, _ = library.int8_mixed_scaled_mm(x, numbers, rows, largest, scales, columns, bias)
    return y


def _floats(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """W as bitsandbytes computes it for a matmul: rounded once, to the dtype of x."""
    return rows.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


@int8_linear.register_fake
def _(
    x: Tensor,
    rows: Tensor,
    shape: list[int],
    scales: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    threshold: Optional[float],  # noqa: UP045
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rows, _, scales, _, _ = inputs
    ctx.save_for_backward(rows, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of ops that autograd knows, so that it is differentiable in turn."""
    rows, scales = ctx.saved_tensors
    need_x, _, _, _, need_bias, _ = ctx.needs_input_grad
    grad_x = grad @ _floats(rows, scales, grad.dtype) if need_x else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
    return grad_x, None, None, None, grad_bias, None


int8_linear.register_autograd(_backward, setup_context=_save)

INT8_LINEAR = torch.ops.oftfx.int8_linear.default
