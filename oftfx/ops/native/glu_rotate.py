"""What a gated layer feeds its last one, made where it is rotated, and the gradients of both."""

import torch
from torch import Tensor

from oftfx.ops.native.binding import call
from oftfx.ops.native.rotate_group import LARGEST, STEP, plain

ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3}
"""Those of `kernels.c`, as they are numbered there."""


def fits(gate: Tensor, core: Tensor, activation: str) -> bool:
    """Whether the kernels take these: float32, and blocks of a width that pays."""
    n, b, _ = core.shape
    return (
        activation in ACTIVATIONS
        and gate.dtype is torch.float32
        and gate.shape[-1] == n * b
        and b % STEP == 0
        and b <= LARGEST
    )


def glu_rotate(gate: Tensor, up: Tensor | None, core: Tensor, activation: str) -> Tensor:
    """`oftfx::glu_rotate`, in one reading of gate and up."""
    gate, (core,) = gate.contiguous(), plain(core)
    up = None if up is None else up.contiguous()
    out = torch.empty_like(gate)
    call("glu_rotate", *_operands(gate, up, core, activation), out.data_ptr())
    return out


def glu_rotate_grad(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    core: Tensor,
    activation: str,
    need_x: bool,
    need_core: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`oftfx::glu_rotate_grad`: all gradients from one reading of grad, gate and up."""
    given, empty = core.dtype, gate.new_empty(0)
    grad, gate, (core,) = grad.contiguous(), gate.contiguous(), plain(core)
    up = None if up is None else up.contiguous()
    grad_gate = torch.empty_like(gate) if need_x else empty
    grad_up = empty if up is None or not need_x else torch.empty_like(up)
    gram = torch.empty_like(core) if need_core else empty
    if need_x or need_core:
        wanted = (t.data_ptr() if t.numel() else 0 for t in (grad_gate, grad_up, gram))
        operands = _operands(gate, up, core, activation)
        call("glu_rotate_grad", *operands, grad.data_ptr(), *wanted)
    return grad_gate, grad_up, gram.to(given)


def _operands(gate: Tensor, up: Tensor | None, core: Tensor, activation: str) -> tuple[int, ...]:
    """The operations of the products; rows, blocks, their width, which activation, and where."""
    n, b, _ = core.shape
    numel = gate.numel()
    held = gate.data_ptr(), 0 if up is None else up.data_ptr(), core.data_ptr()
    return 2 * numel * b, numel // (n * b) if n else 0, n, b, ACTIVATIONS[activation], *held
