"""The gradient of a core in the shares that the runs of a kernel found, before anybody adds them.

    grad_x, grad_core = rotate_grad(…)                  grad_core (n, b, b)
    grad_x, shares = rotate_grad(…, shares=True)        shares (k, n, b, b), float32 at least

A kernel cuts the rows into runs, each of which finds a share, and a launch of its own adds them up.
A graph whose reader adds them (`oftfx.passes.sum_runs`) asks for the shares. Where a gradient is
found as a whole, it is the only one.
"""

import torch
from torch import Tensor


def only(grad: Tensor) -> Tensor:
    """A whole gradient as the only share of itself."""
    return grad.to(_dtype(grad))[None]


def fake(count: int, core: Tensor, *cores: int) -> Tensor:
    """Like so many shares of a core's gradient, or of several cores', of which there are these."""
    return core.new_empty((count, *cores, *core.shape), dtype=_dtype(core))


def _dtype(core: Tensor) -> torch.dtype:
    return torch.promote_types(core.dtype, torch.float32)
