"""One way to define an op whose calls are counted in microseconds.

`torch.library.custom_op` and `register_autograd` cost more Python for each call than a small
layer's own kernel; what they do for every signature, an op here does for its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import (
    _any_requires_grad,
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._dynamo import eval_frame
from torch.autograd.forward_ad import unpack_dual

LIBRARY = torch.library.Library("oftfx", "FRAGMENT")

# By the id of an op, which lives as long as the process: its own hash is a function in Python.
_KERNELS: dict[int, Callable[..., Any]] = {}
_APPLY: dict[int, Callable[..., Any]] = {}
_PLAIN = {Tensor, nn.Parameter}
_DYNAMO: Any = eval_frame
_SKIP = _DYNAMO._FrameExecStrategy(*[_DYNAMO._FrameAction.SKIP] * 2)


def define(schema: str, kernel: Callable[..., Any]) -> Any:
    """Defines an op, ``oftfx::…``, with a kernel for every device; gives its overload back."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    op = getattr(torch.ops.oftfx, name).default
    _KERNELS[id(op)] = kernel
    _hide(kernel)
    return op


def _hide(function: Any) -> None:
    """Keeps Dynamo from compiling a function that an op runs, and what that calls.

    It compiles what Python runs between two of its graphs, and under a transform an op, too, is
    nothing but Python.
    """
    _DYNAMO.set_code_exec_strategy(function.__code__, _SKIP)


def differentiate(op: Any, apply: Callable[..., Any]) -> None:
    """Registers what an op does where a gradient is wanted.

    Args:
        op: What [`define`][oftfx.ops.define.define] gave.
        apply: Takes the op's arguments and gives its results: the `apply` of an
            `autograd.Function`; or, for an op that is itself a gradient, its formula in ops that
            have gradients, which makes it differentiable to any order.
    """

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return apply(*args)
        if _are_functorch_transforms_active() and _has_tangent(args):
            raise RuntimeError(
                f"{op._schema.name} has no forward-mode derivative (torch.func.jvp, jacfwd, "
                "linearize): use the backward one, torch.autograd.grad or .backward()."
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _hide(run)
    LIBRARY.impl(op._schema.name.partition("::")[2], run, "Autograd")
    _APPLY[id(op)] = apply


def _has_tangent(args: Sequence[Any]) -> bool:
    """Whether a forward-mode derivative is being taken with respect to one of the tensors."""
    for arg in args:
        if type(arg) in (list, tuple):
            if _has_tangent(arg):
                return True
        elif isinstance(arg, Tensor) and unpack_dual(arg, level=0).tangent is not None:
            return True
    return False


def call(op: Any, *args: Any) -> Any:
    """``op(*args)``, past PyTorch's dispatcher where nothing there waits for it.

    A matrix product leaves nothing else in the caches, and behind one the dispatcher's way to an op
    in Python and back was measured to take 50 to 80 µs, a small layer's kernel 100 to 600.

    Args:
        op: The op, which comes this way if [`define`][oftfx.ops.define.define] gave it.
        args: Its arguments, none of them named.
    """
    if torch.compiler.is_compiling():  # before the table, all of which would be guarded
        return op(*args)
    kernel = _KERNELS.get(id(op))
    if (
        kernel is None
        # A mode, a transform, a tracer or a profiler is to see the op.
        or not unheard()
        or _profiler_enabled()
        or not _plain(args)
    ):
        return op(*args)
    if torch.is_grad_enabled() and _any_requires_grad(*args):
        return _APPLY[id(op)](*args)
    return kernel(*args)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, which also asks each tensor, in Python, if it is torch.func's."""
    if _are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def unheard() -> bool:
    """Whether no mode, transform or tracer listens to what is called."""
    return not (
        _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
    )


def _plain(args: Sequence[Any]) -> bool:
    """Whether the tensors among an op's arguments leave their ops to PyTorch."""
    for arg in args:
        if type(arg) is list:
            if not _plain(arg):
                return False
        elif type(arg) not in _PLAIN and isinstance(arg, Tensor):
            return False
    return True
