"""The work on parameters keeps their digits, autocast or not."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def exactly(device: torch.device) -> AbstractContextManager[object]:
    """Within it, operations compute in the dtypes they are given."""
    # Not entered without need: an exported graph would keep its traces. `meta` has no autocast.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def as_given(kernel: Callable[P, R]) -> Callable[P, R]:
    """An op's kernel without the autocast of its caller; its first operand is a tensor.

    Autocast reaches into a kernel and would make its float32 results half precision, against the
    op's own schema.
    """

    @functools.wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        with exactly(first.device):
            return kernel(*args, **kwargs)

    return run
