"""`oftfx::frozen_linear`: a product with a frozen weight, by the faster of PyTorch's libraries.

    y = x Wᵀ + bias,    dx = dy W

PyTorch multiplies float32 by MKL, which on AMD's processors does without AVX-512: it was measured
at 195 GFLOP/s on two cores that can do 489. oneDNN, which PyTorch brings as well, reaches 440
there. Sums are taken in another order, so that the results differ by rounding.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.define import LIBRARY, apply, call, define, differentiate
from oftfx.ops.linear import linear
from oftfx.ops.precision import as_given

LEAST_ROWS = 32
"""Rows of x from which oneDNN gains, whatever the weight's shape; with 8 it may lose."""


def gains(x: Tensor, *others: Tensor) -> bool:
    """Whether oneDNN multiplies these faster than what PyTorch would take.

    Args:
        x: (..., in).
        others: What it is multiplied by, and a bias.
    """
    if x.numel() < LEAST_ROWS * max(1, x.shape[-1]):
        return False
    return served(x, *others) and all(operand.numel() for operand in (x, *others))


def served(*operands: Tensor) -> bool:
    """Whether it does so where x has rows enough.

    Never with ``torch.backends.mkldnn.enabled = False``.
    """
    for operand in operands:
        if operand.dtype is not torch.float32 or operand.device.type != "cpu":
            return False
    return torch._C._get_mkldnn_enabled() and is_faster()


@functools.cache
def is_faster() -> bool:
    """Whether MKL is slow on this processor, and oneDNN is there."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    processor = torch.cpu.get_capabilities()
    return "AMD" in str(processor.get("cpu_name")) and bool(processor.get("avx512_f"))


@as_given
def _frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight, bias) if gains(x, weight) else linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


FROZEN_LINEAR = define(
    "frozen_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _frozen_linear
)


@torch.library.register_fake("oftfx::frozen_linear", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``, bit for bit, with a gradient for x by the faster library.

    The op itself takes that library for the result as well.

    Args:
        x: (..., in).
        weight: W, (out, in), which gets no gradient.
        bias: (out,).

    Raises:
        RuntimeError: W requires a gradient.
    """
    result: Tensor = apply(_FrozenLinear, linear, x, weight, bias)
    return result


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix``, by the faster library.

    Args:
        x: (..., in).
        matrix: (in, out), of x's dtype; it gets no gradient.
    """
    if not served(x, matrix):
        return x @ matrix
    # Which looks at the rows, of which a graph that is traced here may have any number.
    result: Tensor = call(FROZEN_LINEAR, x, matrix.t(), None)
    return result


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if ctx.needs_input_grad[2]:
            raise RuntimeError(
                "oftfx::frozen_linear: the weight requires a gradient, which this gives to a "
                "frozen one's x alone: use F.linear, or weight.requires_grad_(False)."
            )
        ctx.save_for_backward(weight)
        result: Tensor = product(x, weight, bias)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        _, need_x, _, need_bias = ctx.needs_input_grad
        return (
            None,
            times(grad, weight) if need_x else None,
            None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None,
        )


differentiate(
    FROZEN_LINEAR, functools.partial(apply, _FrozenLinear, functools.partial(call, FROZEN_LINEAR))
)
