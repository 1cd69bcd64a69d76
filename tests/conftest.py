"""What every test shares: Hypothesis profiles and a fixed random state."""

import os
import sys
from collections.abc import Hashable
from typing import Any

import optree
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import fx, nn
from torch._dynamo.utils import counters

_slow_is_fine = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=_slow_is_fine,
)
settings.register_profile(
    "deep", deadline=None, max_examples=1000, suppress_health_check=_slow_is_fine
)
settings.load_profile(os.environ.get("OFTFX_HYPOTHESIS", "ci"))


@pytest.fixture
def fresh_compiler():
    """No compiled code and no counts of earlier tests, and none left for later ones."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


_traced: dict[Hashable, list[Any]] = {}


@pytest.fixture
def traced_once(monkeypatch):
    """Modules that are alike are traced by the first test that adapts one, for all others.

    For tests of what comes after: with a tiny model, tracing is nearly all that adapting costs.
    """
    planning = sys.modules["oftfx.plan"]  # `oftfx.plan` is the function
    trace = planning.of_graph

    def of_graph(model, example_inputs):
        if isinstance(model, fx.GraphModule) or not isinstance(model, nn.Module):
            return trace(model, example_inputs)
        key = _likeness(model, example_inputs)
        if key not in _traced:
            _traced[key] = trace(model, example_inputs)
        return _traced[key]

    monkeypatch.setattr(planning, "of_graph", of_graph)


def _likeness(model: nn.Module, example_inputs: Any) -> Hashable:
    """Equal for models that have the same graph, and weights of the same kinds."""
    names: dict[int, str] = {}
    leaves, tree = optree.tree_flatten(example_inputs)
    return (
        str(model),
        str(getattr(model, "config", None)),
        tuple((type(module), module.training) for module in model.modules()),
        tuple(
            (name, names.setdefault(id(p), name), p.shape, p.dtype)
            for name, p in model.named_parameters(remove_duplicate=False)
        ),
        tree,
        tuple((leaf.shape, leaf.dtype) if torch.is_tensor(leaf) else leaf for leaf in leaves),
    )


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
