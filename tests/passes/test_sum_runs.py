"""What runs found is added where it is read."""

import importlib
from functools import partial
from types import SimpleNamespace
from uuid import uuid4

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx

import oftfx
from oftfx import OFT, testing
from oftfx.backend import oftfx as backend
from oftfx.ops.cayley_each import CAYLEY_EACH_GRAD
from oftfx.ops.glu_rotate import GLU_ROTATE_GRAD
from oftfx.ops.norm_rotate import NORM_ROTATE_GRAD
from oftfx.ops.rotate import ROTATE_GRAD
from oftfx.passes.sum_runs import FOUND, HOOK, SumRuns, before, sum_runs
from tests.ops.test_cayley_each import JOINING
from tests.small import Attention, rows

cayley_each, glu_rotate, norm_rotate, rotate = (
    importlib.import_module(f"oftfx.ops.{name}")
    for name in ("cayley_each", "glu_rotate", "norm_rotate", "rotate")
)
RUNS = 3


def cut(whole: torch.Tensor) -> torch.Tensor:
    """Shares that a gradient is the exact sum of."""
    return torch.stack([0.5 * whole, 0.25 * whole, 0.25 * whole])


def cutting(grads, **others) -> SimpleNamespace:
    """A GPU's kernels, but of PyTorch: they cut the rows into runs."""

    def shares(*args):
        *found, whole = grads(*args)
        return *found, [cut(torch.stack(whole))] if isinstance(whole, list) else cut(whole)

    return SimpleNamespace(fits=lambda *_: True, shares=shares, runs=lambda *_: RUNS, **others)


def normed(x, norm, cores, dtype):
    return [rotate._rotate(norm_rotate.normed(x, norm, dtype), core, 1) for core in cores]


def norm_grads(grads, x, norm, cores, need_x, need_cores):
    found = norm_rotate._in_parts(grads, x, norm, cores, need_x, False, need_cores)
    return found.x, found.mean, found.rstd, found.cores


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    of_rotate = cutting(rotate._rotate_grad, rotate=rotate._rotate, rotate_grad=rotate._rotate_grad)
    of_glu = cutting(glu_rotate._in_parts, glu_rotate_grad=glu_rotate._in_parts)
    monkeypatch.setattr(rotate, "kernels", lambda *_: of_rotate)
    monkeypatch.setattr(glu_rotate, "kernels", lambda *_: of_glu)
    of_norm = cutting(norm_grads, norm_rotate=normed, norm_rotate_grad=norm_grads)
    monkeypatch.setattr(norm_rotate, "kernels", lambda *_: of_norm)
    monkeypatch.setattr(cayley_each, "kernels", lambda *_: JOINING)


def operands():
    """Of all three gradients and the parameters' behind them; five cores."""
    x, *grads = torch.randn(5, 6, 8).unbind()
    cores = list(torch.randn(4, 2, 4, 4).unbind())
    return x, grads, cores, [0.1 * torch.randn(2, 6) for _ in range(4)]


def layer(x, grads, cores, thetas):
    """The gradients of a layer: of two rotations of a norm, of a product's, and of another."""
    rstd = x.square().mean(-1, keepdim=True).rsqrt()
    norm = NORM_ROTATE_GRAD(grads[:2], x, cores[:2], True, False, True, None, rstd, None, None)
    *dh, glu = GLU_ROTATE_GRAD(grads[2], x, x, cores[2], "silu", True, True)
    dx, plain = ROTATE_GRAD(grads[3], x, cores[3], True, True)
    found = CAYLEY_EACH_GRAD([*norm[-1], glu, plain], thetas, len(plain[0]), 4)
    return [norm[0], *dh, dx, *found]


def read_twice(x, grads, cores, thetas):
    """Something else wants one of the norm's two, and the product's."""
    *_, norm = NORM_ROTATE_GRAD(
        grads[:2], x, cores[:2], True, False, True, None, x[:, :1], None, None
    )
    *_, glu = GLU_ROTATE_GRAD(grads[2], x, x, cores[2], "silu", True, True)
    _, plain = ROTATE_GRAD(grads[3], x, cores[3], True, True)
    found = CAYLEY_EACH_GRAD([*norm, glu, plain], thetas, 4, 4)
    return [norm[0].square(), glu, *found]


def added_to(x, grads, cores, thetas):
    """One core of two rotations, whose gradients are added."""
    (_, first), (_, second) = (ROTATE_GRAD(g, x, cores[0], False, True) for g in grads[:2])
    return CAYLEY_EACH_GRAD([first + second], thetas[:1], 4, 4)


def one_of_two(x, grads, cores, thetas):
    """The first core of two is frozen."""
    *_, (_, second) = NORM_ROTATE_GRAD(
        grads[:2], x, cores[:2], True, False, True, None, x[:, :1], None, None
    )
    return CAYLEY_EACH_GRAD([second], thetas[:1], 4, 4)


def frozen(x, grads, cores, thetas):
    return [
        ROTATE_GRAD(grads[0], x, cores[0], True, False)[0],
        *CAYLEY_EACH_GRAD(cores, thetas, 4, 4),
    ]


def traced(function, given, mode="fake"):
    graph = make_fx(function, tracing_mode=mode)(*given)
    graph.graph.eliminate_dead_code()
    return graph


def giving(graph) -> list:
    """Which ops give shares."""
    nodes = [n for op in FOUND for n in graph.find_nodes(op="call_function", target=op)]
    return [node.target for node in nodes if node.kwargs.get("shares")]


@pytest.mark.parametrize(
    ("function", "handed", "shared"),
    [
        (layer, [ROTATE_GRAD, GLU_ROTATE_GRAD, NORM_ROTATE_GRAD], 4),
        (read_twice, [ROTATE_GRAD], 1),
        (one_of_two, [NORM_ROTATE_GRAD], 1),
        (added_to, [], 0),
        (frozen, [], 0),
    ],
)
def test_hands_over_what_nobody_else_reads(function, handed, shared):
    given = operands()
    graph = traced(function, given)
    expected = graph(*given)
    assert sum_runs(graph.graph) == len(handed)
    graph.graph.lint()
    graph.recompile()
    assert giving(graph.graph) == handed
    assert all(map(torch.equal, graph(*given), expected))
    (reader,) = graph.graph.find_nodes(op="call_function", target=CAYLEY_EACH_GRAD)
    shapes = [tuple(grad.meta["val"].shape) for grad in reader.args[0]]
    assert shapes.count((RUNS, 2, 4, 4)) == shared


def test_leaves_rows_of_any_number_alone():
    graph = traced(layer, operands(), "symbolic")
    assert sum_runs(graph.graph) == 0
    assert giving(graph.graph) == []


def test_leaves_alone_what_is_found_as_a_whole(monkeypatch):
    for module in (rotate, norm_rotate, glu_rotate):
        monkeypatch.setattr(module, "kernels", lambda *_: None)
    graph = traced(layer, operands())
    assert sum_runs(graph.graph) == 0
    assert giving(graph.graph) == []


@pytest.fixture
def everywhere(fresh_compiler, monkeypatch):
    """Parameters are taken where they lie on every device; no other test finds what is compiled."""
    monkeypatch.setattr(SumRuns, "uuid", partial(str, uuid4()))
    module = importlib.import_module("oftfx.passes.batch_cores")
    monkeypatch.setattr(module, "_served", lambda thetas, b, order: order is not None)


def adapted():
    spec = OFT(block_size=4, init_std=0.2)
    return oftfx.adapt(Attention(), spec, example_inputs=rows(torch.float32))


def check(model, **options) -> int:
    """Compiles it with inductor, compares it with the model, and says what the pass saved."""
    compiled = torch.compile(model, backend=backend, options=options, fullgraph=True)
    testing.assert_same_function(compiled, model, rows(torch.float32))
    return counters["oftfx"]["sum_runs"]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("one", [False, True], ids=["as it takes them", "as one"])
def test_inductor_runs_it_before_what_it_was_given(one, monkeypatch):
    if one:
        monkeypatch.delattr(custom_graph_pass, "get_custom_graph_passes", raising=False)
    seen = []
    given = lambda graph: seen.append(giving(graph))  # noqa: E731
    assert check(adapted(), **{HOOK: given}) == 2  # q, k and v together, and the last
    assert [ROTATE_GRAD, NORM_ROTATE_GRAD] in seen


@pytest.mark.usefixtures("everywhere")
def test_is_left_out_by_its_name():
    assert check(adapted(), sum_runs=False) == 0


@pytest.mark.usefixtures("everywhere")
def test_what_is_found_in_a_cache_has_it_applied(monkeypatch):
    model = adapted()
    assert check(model) == 2
    for uuid, saved in (SumRuns.uuid, 0), (partial(str, uuid4()), 2):
        monkeypatch.setattr(SumRuns, "uuid", uuid)
        torch._dynamo.reset()
        counters.clear()
        assert check(model) == saved
        assert ("autograd_cache_miss" in counters["aot_autograd"]) is (saved > 0)


def test_the_caches_know_it_by_its_source(tmp_path, monkeypatch):
    before, other = SumRuns().uuid(), tmp_path / "other.py"
    assert before == SumRuns().uuid()
    other.write_text("another version")
    monkeypatch.setattr(importlib.import_module("oftfx.passes.sum_runs"), "__file__", str(other))
    assert before != SumRuns().uuid()


def test_where_inductor_takes_one_pass_it_is_both(monkeypatch):
    monkeypatch.delattr(custom_graph_pass, "get_custom_graph_passes", raising=False)
    assert isinstance(before(None), SumRuns)
    both, again = before(SumRuns()), before(SumRuns())
    assert isinstance(both, CustomGraphPass)
    assert both.uuid() == again.uuid()
    assert both.uuid() != SumRuns().uuid()
    assert not before(lambda graph: None).uuid()  # which inductor keeps out of its caches
