"""All cores of a graph in one launch."""

import copy
import importlib
import operator

import pytest
import torch
from torch import fx, nn
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import oftfx
from oftfx import OFT, testing
from oftfx.backend import oftfx as backend
from oftfx.ops.cayley import CAYLEY
from oftfx.ops.cayley_each import CAYLEY_EACH, MOST
from oftfx.passes.batch_cores import batch_cores
from tests.ops.test_cayley_each import JOINING
from tests.small import Attention, llama, rows, tokens

SPEC = OFT(block_size=4, init_std=0.2)
PARTITIONS = lookup_backend("aot_eager_decomp_partition")
"""Decides as inductor does what the backward computes again, and compiles nothing."""


@pytest.fixture
def kernels(monkeypatch):
    """A GPU's kernels, but of PyTorch: these take parameters where they lie."""
    module = importlib.import_module("oftfx.ops.cayley_each")
    monkeypatch.setattr(module, "kernels", lambda *_: JOINING)


@pytest.fixture
def everywhere(kernels, monkeypatch):
    """They are asked for on every device."""
    module = importlib.import_module("oftfx.passes.batch_cores")
    monkeypatch.setattr(module, "_served", lambda theta, b, order: order is not None)
    run = lambda graph, inputs, config_patches: PARTITIONS(graph, inputs)  # noqa: E731
    monkeypatch.setattr("oftfx.backend.lookup_backend", lambda name: run)


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


class Regions(nn.Module):
    """A product before a region with gradients, and one in it that the output comes of."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        before = self.a(x)
        with torch.enable_grad():
            return self.c(self.b(x)) + before


@pytest.mark.parametrize("without", [torch.no_grad, torch.enable_grad])
def test_a_region_with_gradients_keeps_them_in_a_graph_without(without):
    x = rows(torch.float32)
    model = oftfx.adapt(Regions(), SPEC, capture="modules")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    trained = [model.b.oft.default.theta, model.c.oft.default.theta]
    with without():
        theirs, ours = model(x), compiled(x)
    for one, other in zip(
        torch.autograd.grad(ours.sum(), trained),
        torch.autograd.grad(theirs.sum(), trained),
        strict=True,
    ):
        testing.assert_close(one, other, "gradient")
    assert counters["oftfx"]["batch_cores"] == (1 if without is torch.no_grad else 2)


def test_a_parameter_that_the_graph_writes_to_is_read_after_that():
    class Bounded(Attention):
        def forward(self, x):
            with torch.no_grad():
                self.q.oft.default.theta.clamp_(-0.01, 0.01)
            return super().forward(x)

    x = rows(torch.float32)
    model = oftfx.adapt(Bounded(), SPEC, capture="modules")
    expected = testing.run(copy.deepcopy(model), x)[0]
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    testing.assert_close(compiled(x), expected, "output")


def test_a_graph_that_begins_with_cores_of_two_kinds_has_a_batch_of_each():
    graph = fx.Graph()
    inputs = [graph.placeholder(f"theta_{i}") for i in range(4)]
    for given in inputs:
        given.meta["example_value"] = torch.zeros(2, 6)
    orders = (3, 2, 3, 2)
    made = [
        graph.call_function(CAYLEY, each) for each in zip(inputs, (4,) * 4, orders, strict=True)
    ]
    graph.output(tuple(made))
    module = fx.GraphModule(nn.Module(), graph)
    thetas = [0.1 * torch.randn(2, 6) for _ in inputs]
    expected = module(*thetas)
    assert batch_cores(module) == 2
    graph = module.graph
    graph.lint()
    assert len(graph.find_nodes(op="call_function", target=CAYLEY)) == 2
    module.recompile()
    for core, own in zip(module(*thetas), expected, strict=True):
        testing.assert_close(core, own, "core")


def batched(thetas: list[torch.Tensor], b: int, order: int | None, rate: float | None = None):
    """The pass, over a graph with a core of each; how often it left each op."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"theta_{i}") for i in range(len(thetas))]
    for given, theta in zip(inputs, thetas, strict=True):
        given.meta["example_value"] = theta
        units = given if rate is None else graph.call_function(operator.mul, (given, rate))
        graph.call_function(CAYLEY, (units, b, order))
    saved = batch_cores(fx.GraphModule(nn.Module(), graph))
    graph.lint()
    ops = (CAYLEY_EACH, CAYLEY, torch.cat)
    each, whole, stacked = (len(graph.find_nodes(op="call_function", target=op)) for op in ops)
    assert saved == len(thetas) - each - whole
    return each, whole, stacked


EACH, STACKED = (1, 0, 0), (0, 1, 1)


def test_on_a_gpu_nothing_is_copied_where_a_kernel_takes_parameters_where_they_lie(kernels):
    with FakeTensorMode():
        made = [torch.empty(n, 6, device="cuda:0") for n in (2, 2, 5)]
        assert batched(made, 4, 3) == EACH
        assert batched(made, 4, None) == STACKED  # the exact transform
        assert batched(made, 4, 3, rate=0.1) == STACKED
        assert batched(made * 3, 4, 3) == (2, 0, 0)  # eight, and one that is left
        assert batched(made * 5, 4, 3) == (2, 0, 0)
        assert batched([theta.cpu() for theta in made], 4, 3) == STACKED


class Uneven(nn.Sequential):
    """Layers of different numbers of blocks, one of which is used twice."""

    def __init__(self):
        last = nn.Linear(8, 8)
        super().__init__(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), last, nn.Tanh(), last)


class Deep(nn.Sequential):
    """More layers than a launch takes parameters."""

    def __init__(self):
        super().__init__(*(nn.Linear(8, 8) for _ in range(MOST + 2)))


@pytest.mark.parametrize("make", [Attention, Uneven, Deep])
@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        OFT(block_size=4, init_std=0.2, dtype=torch.bfloat16),
        OFT(block_size=4, init_std=0.2, unit_rate=True),
        OFT(block_size=4, init_std=0.2, exact=True),
    ],
    ids=lambda spec: str(spec.to_json()),
)
def test_parameters_taken_where_they_lie_change_no_value_and_no_gradient(make, spec, everywhere):
    x = rows(torch.float32)
    model = oftfx.adapt(make(), spec, example_inputs=x)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    testing.assert_same_function(compiled, model, x)
    assert counters["oftfx"]["batch_cores"] > 0


def test_what_turns_one_tensor_finds_its_cores_in_whichever_launch_they_are(
    everywhere, monkeypatch
):
    module = importlib.import_module("oftfx.passes.fuse_norm")
    monkeypatch.setattr(module, "_served", lambda rotation, found, readers=1: True)
    model = oftfx.adapt(llama(), SPEC)
    assert 7 < MOST < 14  # the first of two launches has one rotation of the second layer
    torch.compile(model, backend=backend, fullgraph=True)(**tokens())
    assert counters["oftfx"]["batch_cores"] == 14 - 2
    assert counters["oftfx"]["group"] == 2 * (2 + 1)  # q, k and v; gate and up
    assert counters["oftfx"]["fuse_norm"] == 2 * 2


def test_inductor_compiles_them(everywhere, monkeypatch):
    monkeypatch.setattr("oftfx.backend.lookup_backend", lookup_backend)
    x = rows(torch.float32)
    model = oftfx.adapt(Uneven(), SPEC, example_inputs=x)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    testing.assert_same_function(compiled, model, x)
