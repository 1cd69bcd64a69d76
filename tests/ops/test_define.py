"""Ops are differentiable to any order, and pass the dispatcher by where nobody listens there."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import oftfx
from oftfx import GOFT, HRA, OFT, ops
from oftfx.lower import ATEN
from oftfx.ops import define
from oftfx.ops.givens import GIVENS
from oftfx.ops.rotate import ROTATE
from oftfx.ops.subspace import SUBSPACE

SHAPES = {ROTATE: [(3, 2, 2)], GIVENS: [(5, 2, 2)], SUBSPACE: [(2, 6), (2, 2)]}


@pytest.mark.parametrize("op", SHAPES, ids=str)
def test_three_times(op):
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((4, 6), *SHAPES[op])
    ]

    def derivatives(function):
        values = [function(*leaves)]
        for _ in range(3):
            total = sum((value.sin() * value).sum() for value in values)
            values = torch.autograd.grad(total, leaves, create_graph=True)
        return values

    torch.testing.assert_close(derivatives(op), derivatives(ATEN[op]))


class Names(TorchDispatchMode):
    """The ops that ran within it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=generator, requires_grad=True)
    return x, torch.randn(3, 2, 2, generator=generator, requires_grad=True)


@pytest.fixture
def without_kernels(monkeypatch):
    """An op called directly fails, so that only what the dispatcher runs succeeds."""
    direct = pytest.fail
    monkeypatch.setattr(define, "_KERNELS", dict.fromkeys(define._KERNELS, direct))
    monkeypatch.setattr(define, "_APPLY", dict.fromkeys(define._APPLY, direct))


def test_a_call_in_eager_is_direct(case, monkeypatch):
    used = []

    def spy(name):
        known = getattr(define, name)[id(ROTATE)]

        def run(*args):
            used.append(name)
            return known(*args)

        monkeypatch.setitem(getattr(define, name), id(ROTATE), run)

    spy("_KERNELS")
    spy("_APPLY")
    with torch.no_grad():
        ops.rotate(*case)
    assert used == ["_KERNELS"]
    ops.rotate(*case)
    assert used == ["_KERNELS", "_APPLY", "_KERNELS"]


def test_a_mode_sees_the_ops_of_both_passes(case):
    with Names() as names:
        ops.rotate(*case).sum().backward()
    seen = [name for name in names.seen if name.startswith("oftfx.")]
    assert seen == ["oftfx.rotate.default", "oftfx.rotate_grad.default"]


def test_a_profiler_sees_them(case):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        ops.rotate(*case).sum().backward()
    names = {event.key for event in seen.key_averages()}
    assert {"oftfx::rotate", "oftfx::rotate_grad"} <= names


@pytest.mark.usefixtures("without_kernels")
def test_a_tracer_sees_them(case):
    operands = [tensor.detach() for tensor in case]
    traced = torch.jit.trace(lambda x, core: ops.rotate(x, core), operands, check_trace=False)
    assert "oftfx::rotate" in str(traced.graph)


def test_a_transform_sees_them(case, monkeypatch):
    x, core = (tensor.detach() for tensor in case)
    rows = torch.vmap(lambda row: ops.rotate(row[None], core)[0])
    expected = ops.rotate(x, core)
    with monkeypatch.context() as patch:
        patch.setitem(define._APPLY, id(ROTATE), pytest.fail)
        patch.setitem(define._KERNELS, id(ROTATE), pytest.fail)
        torch.testing.assert_close(rows(x), expected)


class Own(torch.Tensor):
    """A tensor that holds another, and has no numbers of its own."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        told.append(str(func))
        plain = tree_map_only(cls, lambda tensor: tensor.held, args)
        return func(*plain, **(kwargs or {}))


told: list[str] = []


@pytest.mark.parametrize("which", [0, 1])
def test_a_subclass_among_the_operands_is_told(case, which):
    x, core = (tensor.detach() for tensor in case)
    expected = ops.rotate(x, core)
    operands = [x, core]
    operands[which] = Own(operands[which])
    told.clear()
    assert torch.equal(ops.rotate(*operands), expected)
    assert torch.equal(ops.rotate_group(operands[0], operands[1:])[0], expected)
    assert told == ["oftfx.rotate.default", "oftfx.rotate_group.default"]


@pytest.mark.parametrize("spec", [OFT(block_size=4), GOFT(), HRA(rank=2)])
def test_forward_mode_derivatives_are_refused_and_not_zero(spec):
    x = torch.randn(3, 8)
    model = oftfx.adapt(nn.Sequential(nn.Linear(8, 8)), spec, example_inputs=x)
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(model, (x,), (x,))
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jacfwd(model)(x)
    assert torch.equal(torch.vmap(model)(x), model(x))
