"""`oftfx::glu_rotate`: what a gated MLP feeds its last layer, turned as it is made.

``rotate(act(gate)·up, core)``. The product is never written, forward or backward: like the base's
own formula, the gradient reads gate and up and makes it again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oftfx.ops.define import LIBRARY, call, define, differentiate
from oftfx.ops.kernels import kernels, on
from oftfx.ops.precision import as_given
from oftfx.ops.rotate import rotate, rotate_grad
from oftfx.ops.shares import fake, only

aten = torch.ops.aten


class Activation(NamedTuple):
    """A function of each element.

    Attributes:
        value: What it gives.
        grad: From the gradient of that and the argument, the argument's gradient.
    """

    value: Callable[[Tensor], Tensor]
    grad: Callable[[Tensor, Tensor], Tensor]


def _silu_grad(grad: Tensor, x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and (grad.requires_grad or x.requires_grad)):
        return aten.silu_backward.default(grad, x)
    # Alone among these, PyTorch's own has no gradient in turn.
    sigmoid = x.sigmoid()
    return grad * sigmoid * (1 + x * (1 - sigmoid))


ACTIVATIONS = {
    "silu": Activation(F.silu, _silu_grad),
    "gelu": Activation(F.gelu, aten.gelu_backward.default),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: aten.gelu_backward.default(grad, x, approximate="tanh"),
    ),
    "relu": Activation(F.relu, lambda grad, x: aten.threshold_backward.default(grad, x, 0)),
    "relu2": Activation(lambda x: F.relu(x).square(), lambda grad, x: 2 * F.relu(x) * grad),
}
"""The activations that have a kernel, by name."""


def glu_rotate(gate: Tensor, up: Tensor | None, core: Tensor, activation: str) -> Tensor:
    """``rotate(act(gate)·up, core)``; without ``up``, ``rotate(act(gate), core)``.

    Where no kernel serves, the bits are those of the separate ops. Kernels round where those round,
    to x's dtype after the activation, the product and the rotation.

    Args:
        gate: (..., n·b), floating.
        up: The same shape and dtype; None where the layer is not gated.
        core: (n, b, b), the residual blocks.
        activation: A name in [`ACTIVATIONS`][oftfx.ops.glu_rotate.ACTIVATIONS].

    Returns:
        (..., n·b) in gate's dtype, contiguous.

    Raises:
        RuntimeError: The width of gate is not n·b, or up is not like gate.
        KeyError: There is no such activation.
    """
    result: Tensor = call(GLU_ROTATE, gate, up, core, activation)
    return result


def _times(value: Tensor, up: Tensor | None) -> Tensor:
    """``value·up``, where the layer is gated."""
    return value if up is None else value * up


def served(gate: Tensor, core: Tensor, activation: str) -> bool:
    """Whether one kernel does it all, both ways; elsewhere the op costs what its parts do.

    On a GPU, those of float32 take more registers than there are.
    """
    fast = kernels("glu_rotate", gate.device)
    if fast is None or (gate.is_cuda and gate.dtype.itemsize > 2):
        return False
    return bool(fast.fits(gate, core, activation))


def _glu_rotate(gate: Tensor, up: Tensor | None, core: Tensor, activation: str) -> Tensor:
    _check(gate, up, activation)
    fast = kernels("glu_rotate", gate.device)
    if fast is None or not fast.fits(gate, core, activation):
        return rotate(_times(ACTIVATIONS[activation].value(gate), up), core)
    with on(gate.device):
        result: Tensor = fast.glu_rotate(gate, up, core, activation)
    return result


GLU_ROTATE = define(
    "glu_rotate(Tensor gate, Tensor? up, Tensor core, str activation) -> Tensor", _glu_rotate
)


@torch.library.register_fake("oftfx::glu_rotate", lib=LIBRARY)
def _(gate: Tensor, up: Tensor | None, core: Tensor, activation: str) -> Tensor:
    _check(gate, up, activation)
    return gate.new_empty(gate.shape)


def glu_rotate_grad(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    core: Tensor,
    activation: str,
    need_x: bool,
    need_core: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of [`glu_rotate`][oftfx.ops.glu_rotate]; what is not needed comes back empty.

    Args:
        grad: (..., n·b), the gradient of the result.
        gate: (..., n·b).
        up: The same, or None.
        core: (n, b, b).
        activation: As for `glu_rotate`.
        need_x: Whether the gradients of gate and up are wanted.
        need_core: Whether that of the core is wanted.

    Returns:
        (..., n·b) in gate's dtype for gate, the same for up, and (n, b, b) in the core's dtype.
    """
    result: tuple[Tensor, Tensor, Tensor] = call(
        GLU_ROTATE_GRAD, grad, gate, up, core, activation, need_x, need_core
    )
    return result


@as_given
def _in_parts(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    core: Tensor,
    activation: str,
    need_x: bool,
    need_core: bool,
    shares: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    act = ACTIVATIONS[activation]
    value = act.value(gate)
    grad_product, grad_core = rotate_grad(grad, _times(value, up), core, need_x, need_core)
    grad_gate, grad_up = gate.new_empty(0), gate.new_empty(0)
    if need_x:
        grad_gate = act.grad(_times(grad_product, up), gate).contiguous()
        if up is not None:
            grad_up = grad_product * value
    return grad_gate, grad_up, only(grad_core) if shares else grad_core


def _kernels(gate: Tensor, core: Tensor, activation: str, shares: bool) -> Any:
    fast: Any = kernels("glu_rotate", gate.device)
    if fast is None or not fast.fits(gate, core, activation):
        return None
    return None if shares and not hasattr(fast, "shares") else fast


def _glu_rotate_grad(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    core: Tensor,
    activation: str,
    need_x: bool,
    need_core: bool,
    shares: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    fast = _kernels(gate, core, activation, shares)
    if fast is None:
        return _in_parts(grad, gate, up, core, activation, need_x, need_core, shares)
    grad = grad if grad.dtype is gate.dtype else grad.to(gate.dtype)  # as kernels take it to be
    run = fast.shares if shares else fast.glu_rotate_grad
    with on(gate.device):
        result: tuple[Tensor, Tensor, Tensor] = run(
            grad, gate, up, core, activation, need_x, need_core
        )
    return result


GLU_ROTATE_GRAD = define(
    "glu_rotate_grad(Tensor grad, Tensor gate, Tensor? up, Tensor core, str activation, "
    "bool need_x, bool need_core, bool shares=False) -> (Tensor, Tensor, Tensor)",
    _glu_rotate_grad,
)
"""[`glu_rotate_grad`][oftfx.ops.glu_rotate_grad], of a core that needs it in shares too."""


@torch.library.register_fake("oftfx::glu_rotate_grad", lib=LIBRARY)
def _(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    core: Tensor,
    activation: str,
    need_x: bool,
    need_core: bool,
    shares: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_gate = gate.new_empty(gate.shape if need_x else 0)
    grad_up = gate.new_empty(gate.shape if need_x and up is not None else 0)
    if shares:
        fast = _kernels(gate, core, activation, shares)
        runs = fast.runs(grad, gate, up, core, activation, need_x) if fast else 1
        return grad_gate, grad_up, fake(runs, core)
    return grad_gate, grad_up, core.new_empty(core.shape if need_core else 0)


def _check(gate: Tensor, up: Tensor | None, activation: str) -> None:
    """What `rotate` does not check for itself."""
    ACTIVATIONS[activation]
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise RuntimeError(
            f"oftfx::glu_rotate: up is {tuple(up.shape)} {up.dtype} and gate {tuple(gate.shape)} "
            f"{gate.dtype}; they must be alike."
        )


class _GluRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, core: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up, core)
        ctx.activation = activation
        result: Tensor = call(GLU_ROTATE, gate, up, core, activation)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, core = ctx.saved_tensors
        need_gate, need_up, need_core, _ = ctx.needs_input_grad
        grad_gate, grad_up, grad_core = glu_rotate_grad(
            grad, gate, up, core, ctx.activation, need_gate or need_up, need_core
        )
        return (
            grad_gate if need_gate else None,
            grad_up if need_up else None,
            grad_core if need_core else None,
            None,
        )


differentiate(GLU_ROTATE, _GluRotate.apply)
differentiate(GLU_ROTATE_GRAD, _in_parts)
