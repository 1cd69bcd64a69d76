"""What every test shares: Hypothesis profiles and a fixed random state."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
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


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
