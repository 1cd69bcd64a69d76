"""`oftfx::folded_linear`: a rotation and the matmul behind it, by a weight turned once.

    y = (x·M) Wᵀ + bias = x W̃ᵀ + bias,    W̃ = W Mᵀ

The forward is the merged model's, bit for bit. W̃ is kept for the backward, whose ``dx = dy W̃`` is
a matmul of the base's size; the core's gradient then is one reading of x and dx. The weight is
frozen.
"""

from typing import Any

import torch
from torch import Tensor

from oftfx.ops.define import LIBRARY, call, define, differentiate
from oftfx.ops.fold import core_grad, fits, folded, misfit
from oftfx.ops.frozen_linear import times
from oftfx.ops.linear import linear
from oftfx.ops.precision import as_given
from oftfx.ops.rotate import rotate_grad


def folded_linear(x: Tensor, core: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(x·blockdiag(I + C_1 … I + C_n)) Wᵀ + bias``.

    Args:
        x: (..., n·b), floating.
        core: (n, b, b), the residual blocks. A single one, (1, b, b), rotates every block of x.
        weight: W, (out, n·b), floating; folded in its own dtype or the core's, whichever is wider,
            and cast to x's.
        bias: (out,), cast to x's dtype.

    Returns:
        (..., out) in x's dtype.

    Raises:
        RuntimeError: The width of x is not n·b, or not that of W; or W requires a gradient, which
            would cost a matmul more than rotating x does.
    """
    y: Tensor
    y, _ = call(FOLDED_LINEAR, x, core, weight, bias)
    return y


@as_given
def _folded_linear(
    x: Tensor, core: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not fits(x, core, weight.shape):
        raise RuntimeError(misfit("folded_linear", x, core, weight.shape))
    turned = folded(weight, core, x.dtype)
    return linear(x, turned, None if bias is None else bias.to(x.dtype)), turned


FOLDED_LINEAR = define(
    "folded_linear(Tensor x, Tensor core, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
    _folded_linear,
)


@torch.library.register_fake("oftfx::folded_linear", lib=LIBRARY)
def _(x: Tensor, core: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = weight.shape
    torch._check(fits(x, core, shape), lambda: misfit("folded_linear", x, core, shape))
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(weight.shape)


@as_given
def _folded_linear_grad(
    grad: Tensor, x: Tensor, core: Tensor, weight: Tensor, turned: Tensor, need_core: bool
) -> tuple[Tensor, Tensor]:
    grad_x = times(grad, turned)
    return grad_x, core_grad(grad_x, x, core) if need_core else core.new_empty(0)


FOLDED_LINEAR_GRAD = define(
    "folded_linear_grad(Tensor grad, Tensor x, Tensor core, Tensor weight, Tensor turned, "
    "bool need_core) -> (Tensor, Tensor)",
    _folded_linear_grad,
)


@torch.library.register_fake("oftfx::folded_linear_grad", lib=LIBRARY)
def _(
    grad: Tensor, x: Tensor, core: Tensor, weight: Tensor, turned: Tensor, need_core: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), core.new_empty(core.shape if need_core else 0)


class _FoldedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, core: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if ctx.needs_input_grad[2]:
            raise RuntimeError(
                "oftfx::folded_linear: the weight requires a gradient, and only a frozen one is "
                "folded: rotate x instead, or weight.requires_grad_(False)."
            )
        y, turned = call(FOLDED_LINEAR, x, core, weight, bias)
        ctx.mark_non_differentiable(turned)
        ctx.set_materialize_grads(False)
        # W itself, which costs nothing, is for the second derivative alone.
        ctx.save_for_backward(x, core, weight, turned)
        return y, turned

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        need_x, need_core, _, need_bias = ctx.needs_input_grad
        grad_x = grad_core = None
        if need_x or need_core:
            grad_x, grad_core = call(FOLDED_LINEAR_GRAD, grad, *ctx.saved_tensors, need_core)
        return (
            grad_x if need_x else None,
            grad_core if need_core else None,
            None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None,
        )


@as_given
def _in_turn(
    grad: Tensor, x: Tensor, core: Tensor, weight: Tensor, turned: Tensor, need_core: bool
) -> tuple[Tensor, Tensor]:
    """The matmul's gradient, then the rotation's."""
    return rotate_grad(grad @ weight.to(x.dtype), x, core, need_x=True, need_core=need_core)


differentiate(FOLDED_LINEAR, _FoldedLinear.apply)
differentiate(FOLDED_LINEAR_GRAD, _in_turn)
