"""Cores that meet nothing but activations in 16 bits are made in 16 bits."""

import importlib

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import oftfx
from oftfx import OFT, ops, testing
from oftfx.backend import oftfx as backend
from oftfx.ops.cayley import CAYLEY
from oftfx.ops.cayley_each import CAYLEY_EACH
from oftfx.ops.rotate import ROTATE
from oftfx.ops.rounded_cayley import ROUNDED_CAYLEY
from oftfx.passes.batch_cores import batch_cores
from oftfx.passes.round_cores import round_cores
from tests.small import Attention, rows

SPEC = OFT(block_size=4, init_std=0.2)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """On every device."""
    module = importlib.import_module("oftfx.passes.round_cores")
    monkeypatch.setattr(module, "served", lambda dtype, device: dtype == torch.bfloat16)


class Cast(nn.Module):
    """Two layers, one of which computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(8, 8).bfloat16()
        self.wide = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(torch.tanh(self.narrow(x)).float())


def left(model, x, batch: bool = True) -> tuple[int, int]:
    """How many cores are made exactly, and how many rounded, after the pass."""
    found = []

    def count(graph, inputs):
        if batch:
            batch_cores(graph)
        saved = round_cores(graph)
        graph.graph.lint()
        exact = graph.graph.find_nodes(op="call_function", target=CAYLEY)
        rounded = graph.graph.find_nodes(op="call_function", target=ROUNDED_CAYLEY)
        assert len(rounded) == saved
        assert all(node.args[3] == torch.bfloat16 for node in rounded)
        # Later passes go by what the graph says of a core.
        turns = graph.graph.find_nodes(op="call_function", target=ROTATE)
        known = {node.args[1].meta["example_value"].dtype for node in turns}
        assert known == {*[torch.bfloat16] * len(rounded), *[torch.float32] * len(exact)}
        found.append((len(exact), len(rounded)))
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=count, fullgraph=True)(x)
    return found[0]


def adapted(model, spec=SPEC, dtype=torch.bfloat16):
    x = rows(dtype)
    return oftfx.adapt(model.to(dtype), spec, example_inputs=x), x


def test_all_that_16_bits_read_are_rounded():
    assert left(*adapted(Attention())) == (0, 1)
    torch._dynamo.reset()
    assert left(*adapted(Attention()), batch=False) == (0, 4)


def test_those_that_float32_or_float16_reads_are_not():
    assert left(*adapted(Attention(), dtype=torch.float32)) == (1, 0)
    torch._dynamo.reset()
    assert left(*adapted(Attention(), dtype=torch.float16)) == (1, 0)


def test_those_that_kernels_make_in_one_launch_are_rounded_in_it():
    def several(x, *thetas):
        for core in ops.cayley_each(list(thetas), 4, 3):
            x = ops.rotate(x, core)
        return x

    found = []

    def count(graph, inputs):
        saved = round_cores(graph)
        (each,) = graph.graph.find_nodes(op="call_function", target=CAYLEY_EACH)
        found.append((saved, each.args[3:]))
        return graph.forward

    x, thetas = torch.randn(3, 8), [torch.randn(2, 6), torch.randn(2, 6)]
    for dtype in (torch.bfloat16, torch.float32):
        compiled = torch.compile(several, backend=count, fullgraph=True)
        assert torch.equal(compiled(x.to(dtype), *thetas), several(x.to(dtype), *thetas))
    assert found == [(1, (torch.bfloat16,)), (0, (None,))]


def test_the_exact_transform_is_not():
    assert left(*adapted(Attention(), OFT(block_size=4, exact=True))) == (1, 0)


def test_a_share_that_float32_reads_keeps_them_all_exact():
    x = rows(torch.bfloat16)
    model = oftfx.adapt(Cast(), SPEC, example_inputs=x)
    assert left(model, x) == (1, 0)
    torch._dynamo.reset()
    assert left(model, x, batch=False) == (1, 1)


def test_a_core_that_something_else_reads_stays_exact():
    def scaled(x, theta):
        core = ops.cayley(theta, 4, 3)
        return ops.rotate(x, core), core.sum()

    def alone(x, theta):
        return ops.rotate(x, ops.cayley(theta, 4, 3))

    found = []

    def count(graph, inputs):
        found.append(round_cores(graph))
        return graph.forward

    x, theta = torch.randn(3, 8).bfloat16(), torch.randn(2, 6)
    for function in (scaled, alone):
        torch.compile(function, backend=count, fullgraph=True)(x, theta)
    assert found == [0, 1]


def test_autocast_tells_what_is_turned():
    model, x = adapted(Attention(), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert left(model, x) == (0, 1)


def test_without_a_kernel_that_rounds_earlier_it_changes_no_bit():
    """A rotation rounds its core and, in bfloat16, what it finds of the core's gradient, too."""
    model, x = adapted(Attention())
    found = []
    for on in (True, False):
        torch._dynamo.reset()
        counters.clear()
        options = {"round_cores": on}
        compiled = torch.compile(model, backend=backend, options=options, fullgraph=True)
        found.append((compiled(x).detach(), testing.gradients(compiled, x)))
        assert (counters["oftfx"]["round_cores"] > 0) is on
    (out, grads), (expected, exact) = found
    assert torch.equal(out, expected)
    assert grads.keys() == exact.keys()
    assert all(torch.equal(grads[name], exact[name]) for name in exact)
    testing.assert_close(out, model(x).detach(), "output", within=0.02)
