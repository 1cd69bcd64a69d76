"""A product with a frozen weight takes the faster library, in a training step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import oftfx
from oftfx import OFT, testing
from oftfx.backend import oftfx as backend
from oftfx.ops import frozen_linear
from oftfx.ops.frozen_linear import FROZEN_LINEAR, LEAST_ROWS
from oftfx.passes.fold import fold
from oftfx.passes.multiply import multiply
from tests.small import Attention, llama, rows, tokens

SPEC = OFT(block_size=16, init_std=0.2)

pytestmark = pytest.mark.usefixtures("fresh_compiler", "onednn")


def replaced(model, x: Tensor) -> tuple[int, int]:
    """How many matmuls stay, and how many take the op, after the pass."""
    found = []

    def count(graph, inputs):
        before = len(linears(graph))
        done = multiply(graph)
        graph.graph.lint()
        found.append((len(linears(graph)), done))
        assert before == sum(found[-1])
        assert len(graph.graph.find_nodes(op="call_function", target=FROZEN_LINEAR)) == done
        return graph.forward

    torch.compile(model, backend=count, fullgraph=True)(x)
    (only,) = found
    return only


def linears(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph.graph.nodes if node.target in (F.linear, torch._C._nn.linear)]


def attention(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return oftfx.adapt(Attention(32).to(dtype), SPEC, example_inputs=X.to(dtype))


X = rows(torch.float32, 32)


def test_every_product_with_a_frozen_weight():
    assert replaced(attention(), X) == (0, 4)


def test_what_has_no_gradient_is_left():
    with torch.no_grad():
        assert replaced(attention(), X) == (4, 0)


def test_a_weight_that_is_trained_is_left():
    model = attention()
    model.q.weight.requires_grad_()
    assert replaced(model, X) == (1, 3)


def test_a_weight_that_is_computed_is_left():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = attention()
            self.weight = nn.Parameter(torch.randn(8, 32), requires_grad=False)

        def forward(self, x):
            return F.linear(self.inner(x), self.weight * 2)

    assert replaced(Scaled(), X) == (1, 4)


@pytest.mark.parametrize(
    "held",
    [(torch.randn(32),), (torch.randn(8, 32), torch.tensor(2.0)), (torch.eye(32), torch.eye(32))],
    ids=["a vector", "one number for all", "a matrix for a bias"],
)
def test_what_no_layer_holds_is_left(held):
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = attention()
            for i, tensor in enumerate(held):
                self.register_buffer(f"held_{i}", tensor)

        def forward(self, x):
            given = (getattr(self, f"held_{i}") for i in range(len(held)))
            return F.linear(self.inner(x).flatten(0, 1), *given)

    x = torch.randn(1, 32, 32)
    model = Broadcast()
    assert replaced(model, x) == (1, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    testing.assert_close(compiled(x), model(x), "output")


def test_another_dtype_is_left():
    assert replaced(attention(torch.float64), X.double()) == (4, 0)


def test_autocasts_products_are_left():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = attention()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    assert replaced(Cast(), X) == (4, 0)


def test_nothing_is_replaced_where_mkl_is_fast(monkeypatch):
    monkeypatch.setattr(frozen_linear, "is_faster", lambda: False)
    assert replaced(attention(), X) == (4, 0)


def test_a_turned_x_is_multiplied_where_its_weight_would_be_folded(monkeypatch):
    folded = []

    def count(graph, inputs):
        folded.append(fold(graph))
        return graph.forward

    x = torch.randn(1, 300, 32)
    model = attention()
    torch.compile(model, backend=count, fullgraph=True)(x)
    torch._dynamo.reset()
    monkeypatch.setattr(frozen_linear, "is_faster", lambda: False)
    torch.compile(model, backend=count, fullgraph=True)(x)
    if folded[1] == 0:
        pytest.skip("no C compiler")
    assert folded == [0, 4]


@pytest.mark.parametrize("dynamic", [False, True])
def test_values_and_gradients_are_the_eager_models(dynamic):
    model = attention()
    compiled = copy.deepcopy(model)
    compiled.compile(backend=backend, dynamic=dynamic)
    for count in (2 * LEAST_ROWS, LEAST_ROWS - 1):
        x = torch.randn(count, 32)
        testing.assert_close(compiled(x), model(x), "output")
        theirs = testing.gradients(model, x)
        for name, gradient in testing.gradients(compiled, x).items():
            testing.assert_close(gradient, theirs[name], name)
    assert counters["oftfx"]["multiply"] == 4 * counters["oftfx"]["graphs"]


def test_a_model_is_told_how_many_and_an_option_leaves_them():
    for options, expected in (({}, 15), ({"multiply": False}, 0)):
        counters.clear()
        model = oftfx.adapt(llama(), SPEC).train()
        model.compile(backend=backend, options=options)
        testing.gradients(model, tokens(2, LEAST_ROWS))
        assert counters["oftfx"]["multiply"] == expected
        torch._dynamo.reset()
