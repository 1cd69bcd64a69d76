"""The reference of preference training: the policy with its adapter off, for no memory."""

import copy
import functools
from typing import Any

from torch import nn

import oftfx

_POLICY = "oft_policy"


def reference(model: nn.Module) -> Any:
    """What a preference trainer takes for ``ref_model``: the base of an adapted model.

    It shares every module and weight with the model; while it runs, the adapter is off.

    Args:
        model: The adapted policy.

    Returns:
        A model of the same class, less its adapter.

    Raises:
        PlanError: The model has no adapter.
    """
    oftfx.parameters(model)
    twin = copy.copy(model)
    own: Any = type(model)  # type checkers take classes for unhashable
    twin.__class__ = _without_adapter(own)
    vars(twin)[_POLICY] = model  # beside its modules: it is none of them
    return twin


@functools.cache
def _without_adapter(cls: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with oftfx.disabled(vars(self)[_POLICY]):
            return cls.__call__(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
