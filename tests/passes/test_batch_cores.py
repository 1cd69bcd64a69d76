"""All cores of a graph in one launch."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import oftfx
from oftfx import OFT, testing
from oftfx.backend import oftfx as backend
from oftfx.passes.batch_cores import CAYLEY, batch_cores
from tests.small import Attention, llama, rows, tokens

SPEC = OFT(block_size=4, init_std=0.2)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def cayleys(model, x, on: bool = True) -> int:
    """How many cayley ops inductor gets, with the pass and without."""
    counts = []

    def count(graph, inputs):
        saved = batch_cores(graph) if on else 0
        graph.graph.lint()
        found = len(graph.graph.find_nodes(op="call_function", target=CAYLEY))
        counts.append((found, saved))
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=count, fullgraph=True)(x)
    ((found, saved),) = counts
    assert found + saved == cayleys(model, x, on=False) if on else True
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        (SPEC, 1),
        (OFT(block_size=4, overrides={"q": {"block_size": 8}, "k": {"order": 2}}), 3),
        (OFT(block_size=4, overrides={"q": {"dtype": torch.bfloat16}}), 2),
        (OFT(block_size=4, exact=True), 1),
        (OFT(block_size=4, guard="rescale"), 4),  # not of the parameters, but of what they become
        (OFT(block_size=4, unit_rate=True), 1),
        (OFT(block_size=4, unit_rate=True, dtype=torch.bfloat16), 1),
        (OFT(block_size=4, overrides={"q": {"unit_rate": True}, "k": {"unit_rate": True}}), 2),
        (OFT(block_size=4, targets="out"), 1),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else str(value.to_json()),
)
def test_cores_of_one_kind_become_one(spec, left):
    x = rows(torch.float32)
    assert cayleys(oftfx.adapt(Attention(), spec, example_inputs=x), x) == left


@pytest.mark.parametrize(
    ("on", "spec"),
    [
        (True, SPEC),
        (False, SPEC),
        (True, OFT(block_size=4, unit_rate=True, dtype=torch.bfloat16, init_std=1.0)),
    ],
)
def test_changes_no_value_and_no_gradient(on, spec):
    x = rows(torch.float32)
    model = oftfx.adapt(Attention(), spec, example_inputs=x)
    compiled = torch.compile(model, backend=backend, options={"batch_cores": on}, fullgraph=True)
    testing.assert_same_function(compiled, model, x)
    assert (counters["oftfx"]["batch_cores"] > 0) is on


@pytest.mark.slow
def test_a_language_model_has_one_launch_a_block_size():
    model = oftfx.adapt(llama(), SPEC)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    testing.assert_same_function(compiled, model, tokens())
    assert counters["oftfx"]["batch_cores"] % 13 == 0


def test_enters_the_bodies_of_checkpointed_regions():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

        def forward(self, x):
            return checkpoint(self.body, torch.tanh(x), use_reentrant=False)

    x = rows(torch.float32)
    model = oftfx.adapt(Checkpointed(), SPEC, example_inputs=x)
    testing.assert_same_function(torch.compile(model, backend=backend), model, x)
    assert counters["oftfx"]["batch_cores"] >= 1
