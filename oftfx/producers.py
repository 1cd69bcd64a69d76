"""What made the tensor that a layer reads, as autograd recorded it.

    a = silu(gate)                          Gated(gate, up, "silu")
    x = a·up

    h = given.float()                       Normed(h, r, weight)
    r = rsqrt(mean(h²) + ε)
    x = weight·(h·r).to(given.dtype)

From there a rotation's backward can go on by itself: [`through`][oftfx.through.through]. What they
hold, autograd keeps anyway.
"""

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from oftfx.ops.glu_rotate import ACTIVATIONS, glu_rotate_grad
from oftfx.ops.glu_rotate import served as glu_served
from oftfx.ops.kept import saved, watched
from oftfx.ops.rms_rotate import rms_rotate_grad
from oftfx.ops.rms_rotate import served as rms_served


class Gated(NamedTuple):
    """``activation(gate)·up``, the product of a gated layer; without ``up``, the activation alone.

    Attributes:
        gate: (..., width).
        up: The same, or None.
        activation: A name in [`ACTIVATIONS`][oftfx.ops.glu_rotate.ACTIVATIONS].
    """

    gate: Tensor
    up: Tensor | None
    activation: str

    def sources(self) -> list[Tensor]:
        """What gets a gradient."""
        return [self.gate] if self.up is None else [self.gate, self.up]

    def parts(self) -> tuple[tuple[Tensor | None, ...], tuple[str, ...]]:
        """Its tensors, and the rest: together its fields, in their order."""
        return self[:2], self[2:]

    def between(self, made: Any) -> Tensor | None:
        """What autograd keeps on the way from the sources to what a node made."""
        if self.up is None:
            return None
        value: Tensor = made._saved_other if made._saved_self is self.up else made._saved_self
        return value

    def again(self, dtype: torch.dtype) -> Tensor:
        """What was made, in its dtype, made again."""
        value = ACTIVATIONS[self.activation].value(self.gate)
        return (value if self.up is None else value * self.up).to(dtype)

    def served(self, cores: list[Tensor], dtype: torch.dtype) -> bool:
        """Whether a kernel has the gradients of its rotations, which are of this dtype."""
        return (
            len(cores) == 1
            and dtype is self.gate.dtype
            and glu_served(self.gate, cores[0], self.activation)
        )

    def grads(
        self, grads: list[Tensor], cores: list[Tensor], need_cores: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Those of the sources and of the cores, given those of the rotated tensors."""
        grad_gate, grad_up, grad_core = glu_rotate_grad(
            grads[0], self.gate, self.up, cores[0], self.activation, True, need_cores
        )
        return [grad_gate, grad_up][: len(self.sources())], [grad_core]


class Normed(NamedTuple):
    """An RMSNorm, ``x·rstd·weight``.

    Attributes:
        x: (..., width).
        rstd: (..., 1), ``(mean(x²) + ε)^−½`` of each row.
        weight: (width,), frozen; None for ones.
    """

    x: Tensor
    rstd: Tensor
    weight: Tensor | None

    def sources(self) -> list[Tensor]:
        """What gets a gradient."""
        return [self.x]

    def parts(self) -> tuple[tuple[Tensor | None, ...], tuple[()]]:
        """Its tensors, and the rest: together its fields, in their order."""
        return self, ()

    def between(self, made: Any) -> Tensor | None:
        """What autograd keeps on the way from the sources to what a node made."""
        return self.rstd

    def again(self, dtype: torch.dtype) -> Tensor:
        """What was made, in its dtype, made again: rounded where models do, before the weight."""
        y = (self.x * self.rstd).to(dtype)
        return (y if self.weight is None else y * self.weight).to(dtype)

    def served(self, cores: list[Tensor], dtype: torch.dtype) -> bool:
        """Whether a kernel has the gradients of its rotations, which are of this dtype."""
        return rms_served(self.x, cores, dtype)

    def grads(
        self, grads: list[Tensor], cores: list[Tensor], need_cores: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Those of the sources and of the cores, given those of the rotated tensors."""
        grad_x, grad_cores = rms_rotate_grad(
            grads, self.x, self.rstd, self.weight, cores, need_cores
        )
        return [grad_x], grad_cores


Producer: TypeAlias = Gated | Normed


def producer_of(x: Tensor) -> Producer | None:
    """What made x, if that is known and nothing is attached to x yet; else None."""
    if type(x) is not Tensor or x.grad_fn is None or x._version or attached(x) or watched():
        return None
    try:
        return _producer(x, x.grad_fn)
    except RuntimeError:  # something was written to, or let go of, or hooks keep it
        return None


def attached(x: Tensor) -> bool:
    """Whether somebody waits for x's own gradient."""
    return bool(x._backward_hooks) or x.retains_grad


def _producer(x: Tensor, node: Any) -> Producer | None:
    name = node.name()
    if name in ("SiluBackward0", "GeluBackward0"):
        gate, activation = saved(node, "self"), _activation(node, name)
        return Gated(gate, None, activation) if _alike(gate, x) else None
    cast = name == "ToCopyBackward0"
    if cast:
        node = node.next_functions[0][0]
        name = "" if node is None else node.name()
    if name != "MulBackward0":
        return None
    # What hooks keep is looked for here alone: they are on for all of a layer, or off.
    a, b = saved(node, "self"), node._saved_other
    if a is None or b is None:
        return _weighted(x, node, a, b)
    # Of a norm without weights, one number a row is the narrower factor.
    if a.shape != b.shape:
        return _scaled(x, node, a, b, None)
    return None if cast else _product(x, node, a, b)


def _product(x: Tensor, node: Any, a: Tensor, b: Tensor) -> Gated | None:
    if not (_alike(a, x) and _alike(b, x)):
        return None
    for (inner, _), value, up in zip(node.next_functions, (a, b), (b, a), strict=True):
        name = "" if inner is None else inner.name()
        if name in ("SiluBackward0", "GeluBackward0"):
            gate = inner._saved_self
            if attached(value) or not _alike(gate, x):
                return None
            return Gated(gate, up, _activation(inner, name))
    return None


def _activation(node: Any, name: str) -> str:
    if name == "SiluBackward0":
        return "silu"
    return "gelu_tanh" if node._saved_approximate == "tanh" else "gelu"


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype


def _weighted(x: Tensor, node: Any, a: Tensor | None, b: Tensor | None) -> Normed | None:
    """The norm that a frozen weight multiplies: of a frozen factor, the other one is not kept."""
    weight, partner = (a, 1) if b is None else (b, 0)
    if weight is None or weight.shape != x.shape[-1:]:
        return None
    inner = node.next_functions[partner][0]
    name = "" if inner is None else inner.name()
    if name == "ToCopyBackward0":
        if inner._input_metadata[0].dtype is not x.dtype:
            return None  # rounded to fewer digits than x has
        inner = inner.next_functions[0][0]
        name = "" if inner is None else inner.name()
    if name != "MulBackward0":
        return None
    return _scaled(x, inner, inner._saved_self, inner._saved_other, weight)


def _scaled(
    x: Tensor, node: Any, a: Tensor | None, b: Tensor | None, weight: Tensor | None
) -> Normed | None:
    """What each row of is multiplied by its root mean square's inverse."""
    if a is None or b is None:
        return None
    source, rstd, place = (a, b, 1) if b.shape[-1:] == (1,) else (b, a, 0)
    if source.shape != x.shape or rstd.shape != (*x.shape[:-1], 1) or attached(rstd):
        return None
    if source.device != x.device:  # where a model's layers are spread, a cast may be a move
        return None
    made = node.next_functions[place][0]
    return Normed(source, rstd, weight) if _is_rms(made, source, rstd) else None


def _is_rms(node: Any, x: Tensor, rstd: Tensor) -> bool:
    """Whether a node made rstd as ``rsqrt(mean(x²) + ε)`` of each row."""
    if node is None or node.name() != "RsqrtBackward0":
        return False
    if node._saved_result.data_ptr() != rstd.data_ptr():
        return False
    (add, _), *_ = node.next_functions
    if add is None or add.name() != "AddBackward0":
        return False
    (mean, _), *others = add.next_functions
    if mean is None or mean.name() != "MeanBackward1" or (others and others[0][0] is not None):
        return False
    dims = mean._saved_dim
    if len(dims) != 1 or dims[0] not in (x.dim() - 1, 2**64 - 1):
        return False
    power = mean.next_functions[0][0]
    return (
        power is not None
        and power.name() == "PowBackward0"
        and power._saved_exponent == 2
        and power._saved_self is x
    )
