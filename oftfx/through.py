"""Rotations whose backward goes on through what made x.

    recorded                                 the backward
    x = producer(sources)                    d sources, dC_i = one op of (dy_i, sources, C_i)
    y_i = rotate(x, C_i)

PyTorch would give x its gradient, and then go back through each op that made it in passes of their
own. They stay in its graph and get no gradient from here. Only where somebody waits for one of
theirs, or for the gradients' own gradient, does the backward take PyTorch's way.
"""

import functools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.define import apply, unheard
from oftfx.ops.rotate_group import rotate_group_grad
from oftfx.producers import Producer, attached, producer_of

Turn = Callable[[Tensor, list[Tensor]], Sequence[Tensor]]


def known(x: Tensor) -> Producer | None:
    """What made x, if a backward can go on through it, and no mode, transform or tracer listens."""
    if x.grad_fn is None or not torch.is_grad_enabled():
        return None
    return producer_of(x) if unheard() else None


def through(
    x: Tensor, cores: list[Tensor], dtype: torch.dtype, turn: Turn
) -> tuple[Tensor, ...] | None:
    """``turn(x, cores)``, whose backward goes on through what made x.

    Args:
        x: What is rotated.
        cores: Each (n, b, b), of one shape.
        dtype: What x is cast to before.
        turn: Gives, for each core, a tensor of x's shape whose gradient is that of a rotated x.

    Returns:
        None where nothing known made x, where no kernel serves it, and under a mode, a transform or
        a tracer.
    """
    producer = known(x)
    if producer is None or not producer.served(cores, dtype):
        return None
    result: tuple[Tensor, ...] = apply(
        _Through,
        _Between(x, producer),
        producer,
        dtype,
        turn,
        len(cores),
        x,
        *cores,
        *producer.sources(),
    )
    return result


class _Between:
    """Whatever lies between a rotation and the sources of its x, for others to wait for.

    What autograd does not keep, such as most steps of a norm, and hooks on nodes of the graph in
    place of tensors, cannot be seen from here.

    Args:
        x: What is rotated.
        producer: What made it.
    """

    def __init__(self, x: Tensor, producer: Producer) -> None:
        self._x = weakref.ref(x)
        # As `register_hook` begins: hooks that are registered on x from now on are seen in it.
        if x._backward_hooks is None:
            x._backward_hooks = OrderedDict()
            x.grad_fn._register_hook_dict(x)  # type: ignore[union-attr]
        self._hooks = x._backward_hooks
        value = producer.between(x.grad_fn)
        self._value = None if value is None else weakref.ref(value)
        self._alone = _held_by_a_graph()

    def awaited(self) -> bool:
        """Whether anybody holds one of these tensors, and could ask for its gradient."""
        if self._x() is not None or self._hooks:
            return True
        return self._value is not None and _held(self._value) > self._alone


def _held(tensor: "weakref.ref[Tensor]") -> int:
    """How many hold a tensor, autograd among them; one that has something attached, very many."""
    value = tensor()
    if value is None:
        return 0
    return sys.maxsize if attached(value) else sys.getrefcount(value)


@functools.cache
def _held_by_a_graph() -> int:
    """The same of a tensor that autograd alone keeps; asked where no hooks watch what it keeps."""
    with torch.enable_grad():
        one = torch.ones(1, device="cpu", requires_grad=True)
        product = torch.exp(one) * torch.exp(one)
    return _held(weakref.ref(product.grad_fn._saved_self))  # type: ignore[union-attr]


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        between: _Between,
        producer: Producer,
        dtype: torch.dtype,
        turn: Turn,
        count: int,
        x: Tensor,
        *given: Tensor,
    ) -> tuple[Tensor, ...]:
        cores, (held, rest) = given[:count], producer.parts()
        ctx.save_for_backward(*cores, *held)
        ctx.between, ctx.count, ctx.dtypes = between, count, (x.dtype, dtype)
        ctx.kind, ctx.rest = type(producer), rest
        return tuple(turn(x if x.dtype is dtype else x.to(dtype), list(cores)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        awaited = ctx.between.awaited()  # before anything below holds what it counts holders of
        count, saved = ctx.count, ctx.saved_tensors
        cores, producer = list(saved[:count]), ctx.kind(*saved[count:], *ctx.rest)
        need_x, *needed = ctx.needs_input_grad[5:]
        need_cores = any(needed[:count])
        grad_x: Tensor | None = None
        sources: Sequence[Tensor | None]
        if torch.is_grad_enabled() or awaited:
            made, dtype = ctx.dtypes
            x = producer.again(made).to(dtype)
            grad_x, of_cores = rotate_group_grad(list(grads), x, cores, need_x, need_cores)
            sources = [None] * (len(needed) - count)
        else:
            sources, of_cores = producer.grads(list(grads), cores, need_cores)
        found = zip((*of_cores, *sources), needed, strict=True)
        return (*[None] * 5, grad_x, *[grad if need else None for grad, need in found])
