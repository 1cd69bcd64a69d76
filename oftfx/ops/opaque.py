"""An op from a pure function of one tensor, for work on parameters that is done once a step.

In a graph its one node keeps the digits of the parameters, autocast or not. The gradient is that of
the function, computed anew: nothing but the parameter is kept for it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.precision import as_given, exactly


def opaque(
    name: str, function: Callable[[Tensor], Tensor | tuple[Tensor, ...]], outputs: int
) -> Any:
    """Defines an op, ``oftfx::name(x) -> outputs``, for every device; gives its overload back.

    Args:
        name: Of the op.
        function: Gives contiguous tensors that share no memory with x; differentiable.
        outputs: How many it gives.
    """
    results = ", ".join(["Tensor"] * outputs)
    schema = f"(Tensor x) -> {results if outputs == 1 else f'({results})'}"
    op = torch.library.custom_op(
        f"oftfx::{name}", as_given(function), mutates_args=(), schema=schema
    )
    op.register_fake(function)

    def save(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (x,) = ctx.saved_tensors
        again = torch.is_grad_enabled()  # the gradient's own gradient is wanted
        with torch.enable_grad(), exactly(x.device):
            return torch.autograd.grad(function(x), x, grads, create_graph=again)

    op.register_autograd(backward, setup_context=save)
    return getattr(torch.ops.oftfx, name).default
