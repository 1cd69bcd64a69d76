"""What others must not be moved across."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oftfx.passes.effects import barrier, epochs, writes


def node(op, target, *args, **kwargs):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    return graph.create_node(op, target, (x, *args), kwargs)


@torch.library.custom_op("oftfx_tests::double", mutates_args={"x"})
def double(x: torch.Tensor) -> None:
    """A user's own op, which a model calls by no overload's name."""
    x.mul_(2)


WRITING = [
    node("call_method", "mul_", 2),
    node("call_function", operator.iadd, 2),
    node("call_function", operator.setitem, 0, 1.0),
    node("call_function", torch.relu_),
    node("call_function", F.relu, inplace=True),
    node("call_function", F.relu, True),
    node("call_function", F.elu, 1.0, True),
    node("call_function", F.normalize, 2.0, -1, 1e-12, node("call_method", "clone")),
    node("call_function", lambda x, **flags: x, inplace=True),
    node("call_function", torch.add, 1, out=node("call_method", "clone")),
    node("call_function", torch.ops.aten.add_.Tensor, 1),
    node("call_function", torch.ops.oftfx_tests.double),
    node("call_function", torch.ops.higher_order.cond, 1),
    node("call_module", "layer"),
]
READING = [
    node("call_method", "mul", 2),
    node("call_method", "__getitem__", 0),
    node("call_function", operator.add, 2),
    node("call_function", operator.getitem, 0),
    node("call_function", operator.invert),
    node("call_function", operator.and_, True),
    node("call_function", F.relu, inplace=False),
    node("call_function", F.relu, False),
    node("call_function", F.normalize, 2.0, -1),
    node("call_function", torch.ops.oftfx.rotate, 1),
    node("call_function", torch.ops.aten.add.Tensor, 1),
    node("call_function", torch.ops.oftfx.rotate.default, 1),
    torch.fx.Graph().placeholder("x"),
]


@pytest.mark.parametrize("writing", WRITING, ids=str)
def test_writes(writing):
    assert writes(writing)


@pytest.mark.parametrize("reading", READING, ids=str)
def test_only_reads(reading):
    assert not writes(reading)


def holder(body):
    """A node of a graph module that runs another graph."""

    def inner(x):
        return body(x)

    root = torch.nn.Module()
    root.body = torch.fx.symbolic_trace(inner)
    graph = torch.fx.Graph()
    given = graph.get_attr("body"), graph.placeholder("x")
    held = graph.call_function(torch.ops.higher_order.autograd_function_apply, given)
    module = torch.fx.GraphModule(root, graph)
    return next(node for node in module.graph.nodes if node.target is held.target)


def test_what_holds_graphs_writes_what_they_write():
    assert writes(holder(lambda x: x.mul_(2)))
    assert not writes(holder(lambda x: x * 2))
    made = torch.ops.aten.mul.Tensor
    assert not writes(holder(lambda x: made(x, 2).add_(1)))
    assert writes(holder(lambda x: torch.ops.aten.view.default(x, [-1]).add_(1)))


def test_a_layer_that_is_known_only_reads():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True)))
    linear, relu = (node for node in traced.graph.nodes if node.op == "call_module")
    assert not writes(linear)
    assert writes(relu)


def test_epochs_begin_with_what_others_may_not_be_moved_across():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_method("add", (x, 1))
    written = graph.call_method("mul_", (x, 2))
    off = graph.call_function(torch._C._set_grad_enabled, (False,))
    last = graph.call_method("add", (x, 1))
    assert barrier(written)
    assert barrier(off)
    assert list(epochs(graph).items()) == [(x, 0), (first, 0), (written, 1), (off, 2), (last, 2)]
