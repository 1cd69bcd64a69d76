"""Weights are folded where that costs less than rotating, as an eager training step decides it."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import oftfx
from oftfx import BOFT, HRA, OFT, testing
from oftfx.backend import oftfx as backend
from oftfx.ops import frozen_linear
from oftfx.ops.cost import fold_from
from oftfx.ops.folded_linear import FOLDED_LINEAR
from oftfx.ops.rotate import ROTATE
from oftfx.passes import PASSES
from oftfx.passes.fold import fold
from oftfx.sites import linear
from tests.small import Attention, llama, rows, tokens

SPEC = OFT(block_size=16, init_std=0.2)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def choose(monkeypatch) -> Iterator[Callable[[str], None]]:
    """Sets what the environment says."""

    def chosen(value: str) -> None:
        monkeypatch.setenv("OFTFX_FOLD", value)
        fold_from.cache_clear()

    yield chosen
    fold_from.cache_clear()


@pytest.fixture
def forced(choose) -> None:
    """All fold that can."""
    choose("1")


def left(model, x: Tensor, dynamic: bool | None = False) -> tuple[int, int]:
    """How many ops rotate, and how many fold, after the pass."""
    found = []

    def count(graph, inputs):
        before = len(ops(graph, ROTATE))
        folded = fold(graph)
        graph.graph.lint()
        found.append((len(ops(graph, ROTATE)), len(ops(graph, FOLDED_LINEAR))))
        assert found[-1] == (before - folded, folded)
        return graph.forward

    torch.compile(model, backend=count, fullgraph=True, dynamic=dynamic)(x)
    (only,) = found
    return only


def ops(graph: torch.fx.GraphModule, target) -> list[torch.fx.Node]:
    return graph.graph.find_nodes(op="call_function", target=target)


def adapted(model: nn.Module, spec=SPEC) -> nn.Module:
    return oftfx.adapt(model, spec, capture="modules")


def attention(spec=SPEC) -> nn.Module:
    return oftfx.adapt(Attention(32), spec, example_inputs=X)


X = rows(torch.float32, 32)


class Two(nn.Module):
    """Two layers, and what becomes of them."""

    def __init__(self, forward: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.does = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self.a, self.b, x)


def test_a_rotation_and_its_matmul_become_one_op(forced):
    assert left(attention(), X) == (0, 4)


def test_by_default_it_decides_as_an_eager_step_does(monkeypatch):
    """The readers of one tensor together, and a layer alone: at one row less, at their bounds.

    Where MKL is as fast as any: `multiply` has the others.
    """
    monkeypatch.setattr(frozen_linear, "is_faster", lambda: False)
    one, three = (fold_from(outs, 16, torch.float32, CPU) for outs in ((16,), (64, 16, 16)))
    if one is None or three is None:
        pytest.skip("no C compiler")

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(32, 64), nn.Linear(32, 16), nn.Linear(32, 16)
            self.out = nn.Linear(32, 16)

        def forward(self, x):
            return self.q(x).sum() + self.k(x).sum() + self.v(x).sum() + self.out(x.tanh()).sum()

    eager: list[int] = []
    real = linear.folded_linear
    monkeypatch.setattr(linear, "folded_linear", lambda x, *a: eager.append(len(x)) or real(x, *a))
    for count in (one - 1, one, three - 1, three):
        x = torch.randn(count, 32)
        model = oftfx.adapt(Grouped(), SPEC, example_inputs=x).train()
        model(x)
        _, folded = left(model, x)
        assert folded == eager.count(count) == (count >= one) + 3 * (count >= three)
        torch._dynamo.reset()


def test_nothing_folds_where_that_is_asked_for(choose):
    choose("0")
    assert left(attention(), torch.randn(4096, 32)) == (4, 0)


@pytest.mark.parametrize("on", [True, False])
def test_changes_no_value_and_no_gradient(on, forced):
    model = attention()
    compiled = torch.compile(model, backend=backend, options={"fold": on}, fullgraph=True)
    testing.assert_same_function(compiled, model, X)
    assert (counters["oftfx"]["fold"] > 0) is on


def test_the_forward_is_that_of_the_merged_model_bit_for_bit(forced):
    model = adapted(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 48, bias=False)))
    got = torch.compile(model, backend=backend, fullgraph=True)(X)
    assert counters["oftfx"]["fold"] == 2
    assert torch.equal(got, oftfx.merge(copy.deepcopy(model))(X))


def test_under_autocast(forced):
    """Which casts x for each reader, and the weights in each matmul."""
    model = attention()
    with torch.autocast("cpu", torch.bfloat16):
        assert left(model, X) == (0, 4)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        testing.assert_close(compiled(X).detach(), model(X).detach(), "output", within=0.02)


def test_in_the_bodies_of_checkpointed_regions(forced):
    model = adapted(Two(lambda a, b, x: checkpoint(lambda x: b(a(x)), x, use_reentrant=False)))
    testing.assert_same_function(torch.compile(model, backend=backend), model, X)
    assert counters["oftfx"]["fold"] >= 2


def test_biases_may_be_trained(forced):
    model = attention()
    for bias in (model.q.bias, model.out.bias):
        bias.requires_grad_(True)
    testing.assert_same_function(torch.compile(model, backend=backend), model, X)
    assert counters["oftfx"]["fold"] >= 4


def test_without_a_gradient_x_is_rotated(forced):
    model = attention()
    with torch.no_grad():
        assert left(model, X) == (4, 0)
    torch._dynamo.reset()

    def teacher(a, b, x):
        with torch.no_grad():
            target = a(x)
        return target - b(x)

    assert left(adapted(Two(teacher)), X) == (1, 1)


def test_a_trained_weight_is_left_and_so_are_the_other_readers_of_its_input(forced):
    model = attention()
    model.k.weight.requires_grad_(True)
    assert left(model, X) == (3, 1)


def test_layers_that_share_a_rotation_are_left(forced):
    """Whose core, as Dynamo traces it, is made anew for each of them."""
    for options in ({}, {"guard": "exact"}, {"dropout": 0.5}):
        model = attention(OFT(block_size=16, share_inputs=True, **options)).train()
        assert left(model, X) == (3, 1)
        torch._dynamo.reset()


@pytest.mark.parametrize("shape", [(), (15, 32)], ids=["one number", "a matrix"])
def test_a_bias_that_is_broadcast_is_left(shape, forced):
    def added(a, b, x):
        return F.linear(a.oft.default(x.flatten(0, 1)), a.weight, bias)

    bias = torch.randn(shape)
    x = torch.randn(3, 5, 32)
    model = adapted(Two(added))
    assert left(model, x) == (1, 0)


def test_what_else_reads_the_rotated_tensor_keeps_it(forced):
    def twice(a, b, x):
        turned = a.oft.default(x)
        return F.linear(turned, a.weight) + turned

    assert left(adapted(Two(twice)), X) == (1, 0)


@pytest.mark.parametrize(
    "spec",
    [
        BOFT(block_size=16, factors=2),
        HRA(rank=2),
        OFT(block_size=16, share_blocks=True),
        OFT(block_size=16, magnitude=True),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_what_no_eager_step_folds_is_left(spec, forced):
    _, folded = left(attention(spec), X)
    assert folded == 0


def test_with_a_second_adapter_both_rotate(forced):
    model = attention()
    oftfx.adapt(model, SPEC, "second", example_inputs=X)
    assert left(model, X) == (8, 0)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert left(model, X) == (8, 0)


def test_a_tensor_written_to_between_the_rotation_and_the_matmul(forced):
    def writes(a, b, x):
        x = x.clone()
        turned = a.oft.default(x)
        x.mul_(2)
        return F.linear(turned, a.weight) + x

    assert left(adapted(Two(writes)), X) == (1, 0)


def test_of_an_unknown_number_of_rows_the_fewest_possible_decide(monkeypatch):
    monkeypatch.setattr(frozen_linear, "is_faster", lambda: False)
    least = fold_from((32,), 16, torch.float32, CPU)
    if least is None:
        pytest.skip("no C compiler")
    model = adapted(nn.Sequential(nn.Linear(32, 32)))
    for fewest, expected in ((2, (1, 0)), (least, (0, 1))):
        x = torch.randn(4 * least, 32)
        torch._dynamo.mark_dynamic(x, 0, min=fewest, max=1 << 20)
        assert left(model, x, dynamic=None) == expected
        torch._dynamo.reset()


def test_it_runs_before_what_would_fuse_the_rotations(forced):
    assert next(iter(PASSES)) == "fold"
    model = attention()
    torch.compile(model, backend=backend, fullgraph=True)(X)
    assert (counters["oftfx"]["fold"], counters["oftfx"]["group"]) == (4, 0)


def test_explain_tells_of_it(forced):
    model = attention()
    oftfx.compile(model)(X)
    text = str(oftfx.explain(model))
    assert "grouped, 1 rows fold" in text
    assert "passes: fold 4," in text


@pytest.mark.slow
def test_a_language_model(forced):
    model = oftfx.adapt(llama(), SPEC)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    testing.assert_same_function(compiled, model, tokens())
    assert counters["oftfx"]["fold"] % (2 * 7) == 0
    assert counters["oftfx"]["fold"]
