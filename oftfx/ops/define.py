"""One way to define an op whose calls are counted in microseconds.

`torch.library.custom_op` and `register_autograd` cost more Python for each call than a small
layer's own kernel; what they do for every signature, an op here does for its own.
"""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("oftfx", "FRAGMENT")


def define(schema: str, kernel: Callable[..., Any]) -> Any:
    """Defines an op, ``oftfx::…``, with a kernel for every device; gives its overload back."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    return getattr(torch.ops.oftfx, name).default


def differentiate(op: Any, apply: Callable[..., Any]) -> None:
    """Registers what an op does where a gradient is wanted.

    Args:
        op: What [`define`][oftfx.ops.define.define] gave.
        apply: Takes the op's arguments and gives its results: the `apply` of an
            `autograd.Function`; or, for an op that is itself a gradient, its formula in ops that
            have gradients, which makes it differentiable to any order.
    """

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return apply(*args)
        return below(op, *args)

    LIBRARY.impl(op._schema.name.partition("::")[2], run, "Autograd")


def below(op: Any, *args: Any) -> Any:
    """Calls an op beneath autograd: from the forward of its own `autograd.Function`."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
