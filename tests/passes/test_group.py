"""Rotations of one tensor become one op."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import oftfx
from oftfx import OFT, testing
from oftfx.backend import oftfx as backend
from oftfx.ops.rotate import ROTATE
from oftfx.ops.rotate_group import ROTATE_GROUP
from oftfx.passes.batch_cores import batch_cores
from oftfx.passes.group import group
from tests.small import Attention, llama, rows, tokens

SPEC = OFT(block_size=4, init_std=0.2)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def left(model, x) -> tuple[int, int]:
    """How many ops rotate one tensor once, and how many several times, after the pass."""
    found = []

    def count(graph, inputs):
        batch_cores(graph)
        before = len(graph.graph.find_nodes(op="call_function", target=ROTATE))
        saved = group(graph)
        graph.graph.lint()
        alone = len(graph.graph.find_nodes(op="call_function", target=ROTATE))
        groups = graph.graph.find_nodes(op="call_function", target=ROTATE_GROUP)
        found.append((alone, len(groups)))
        assert before == alone + saved + len(groups)
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=count, fullgraph=True)(x)
    return found[0]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (SPEC, (1, 1)),  # q, k and v; out
        (OFT(block_size=4, share_inputs=True), (2, 0)),
        (OFT(block_size=4, overrides={"q": {"block_size": 8}}), (2, 1)),
        (OFT(block_size=4, targets=("q", "out")), (2, 0)),
    ],
    ids=["each", "shared", "another block size", "alone"],
)
def test_what_reads_one_tensor_becomes_one(spec, expected):
    x = rows(torch.float32)
    assert left(oftfx.adapt(Attention(), spec, example_inputs=x), x) == expected


def test_a_second_adapter_reads_what_the_first_turned():
    x = rows(torch.float32)
    model = oftfx.adapt(Attention(), SPEC, example_inputs=x)
    oftfx.adapt(model, SPEC, "second", example_inputs=x)
    assert left(model, x) == (5, 1)


@pytest.mark.parametrize("on", [True, False])
def test_changes_no_value_and_no_gradient(on):
    x = rows(torch.float32)
    model = oftfx.adapt(Attention(), SPEC, example_inputs=x)
    compiled = torch.compile(model, backend=backend, options={"group": on}, fullgraph=True)
    testing.assert_same_function(compiled, model, x)
    assert (counters["oftfx"]["group"] > 0) is on


def test_casts_of_one_tensor_are_one_tensor():
    x = rows(torch.float32)
    model = oftfx.adapt(Attention(), SPEC, example_inputs=x)
    with torch.autocast("cpu", torch.bfloat16):
        assert left(model, x) == (1, 1)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        testing.assert_close(compiled(x).detach(), model(x).detach(), "output", within=0.02)


@pytest.mark.parametrize(
    "write",
    [lambda x: x.mul_(2), nn.ELU(inplace=True), lambda x: F.normalize(x, 2.0, -1, 1e-12, x)],
    ids=["a method", "a flag", "an output"],
)
def test_a_tensor_written_to_between_two_rotations(write):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x.clone()
            first = self.a(x)
            write(x)
            return first + self.b(x)

    x = rows(torch.float32)
    model = oftfx.adapt(Writes(), SPEC, example_inputs=x)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        testing.assert_close(compiled(x), model(x), "output")


def test_one_without_and_one_with_a_gradient_stay_two():
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.no_grad():
                target = self.a(x)
            return target - self.b(x)

    x = rows(torch.float32)
    model = oftfx.adapt(Teacher(), SPEC, example_inputs=x)
    found = []

    def count(graph, inputs):
        found.append(group(graph))
        return graph.forward

    torch.compile(model, backend=count, fullgraph=True)(x)
    assert found == [0]


@pytest.mark.slow
def test_a_language_model():
    model = oftfx.adapt(llama(), SPEC)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    testing.assert_same_function(compiled, model, tokens())
    assert counters["oftfx"]["group"] % (2 * (2 + 1)) == 0
    assert counters["oftfx"]["group"]
