"""Ops compute in the dtypes they are given, autocast or not."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def as_given(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function whose first operand is a tensor without the autocast of its caller.

    Autocast reaches into an op's kernel and would make its float32 results half precision, against
    the op's own schema.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run
