"""What every test shares: Hypothesis profiles and a fixed random state."""

import importlib
import os
from collections.abc import Hashable
from typing import Any

import optree
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import fx, nn
from torch._dynamo.utils import counters

import oftfx
from oftfx.ops import frozen_linear

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


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN's products, on every processor that has them."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(frozen_linear, "is_faster", lambda: True)


_traced: dict[Hashable, list[Any]] = {}


@pytest.fixture(autouse=True)
def _trace_once(monkeypatch):
    """`oftfx.adapt` traces models that are alike once; `oftfx.plan` as ever.

    With a tiny model, tracing is nearly all that adapting costs.
    """
    planning = importlib.import_module("oftfx.plan")
    trace, plan = planning.of_graph, planning.plan

    def of_graph(model: Any, example_inputs: Any) -> list[Any]:
        if not _is_told_by_its_parts(model):
            return trace(model, example_inputs)
        key = _likeness(model, example_inputs)
        if key not in _traced:
            _traced[key] = trace(model, example_inputs)
        return _traced[key]

    def planned(*args: Any, **kwargs: Any) -> oftfx.Plan:
        with monkeypatch.context() as within:
            within.setattr(planning, "of_graph", of_graph)
            return plan(*args, **kwargs)

    for user in ("oftfx.adapter", "oftfx.interop.peft.read"):
        monkeypatch.setattr(importlib.import_module(user), "plan", planned)


def _is_told_by_its_parts(model: Any) -> bool:
    """Whether its forward depends on nothing but its classes, their print and a config."""
    if isinstance(model, fx.GraphModule) or not isinstance(model, nn.Module):
        return False
    known = ("torch.nn.", "tests.small")
    classes = {type(module) for module in model.modules()}
    return hasattr(model, "config") or all(cls.__module__.startswith(known) for cls in classes)


def _likeness(model: nn.Module, example_inputs: Any) -> Hashable:
    """Equal for models of equal graphs and kinds of weights that are traced in one setting."""
    first: dict[int, str] = {}
    leaves, tree = optree.tree_flatten(example_inputs)
    setting = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return (
        (*setting, torch.is_autocast_enabled("cpu"), torch.get_default_device()),
        (str(model), str(getattr(model, "config", None))),
        tuple((type(m), m.training, frozenset(vars(m))) for m in model.modules()),
        tuple(
            (name, first.setdefault(id(p), name), p.shape, p.dtype, p.device)
            for name, p in model.named_parameters(remove_duplicate=False)
        ),
        (tree, tuple((x.shape, x.dtype) if torch.is_tensor(x) else x for x in leaves)),
    )


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
