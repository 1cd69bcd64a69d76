"""One expression is found in all its spellings, and nothing else is."""

import operator

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from oftfx.passes.pattern import Call, Capture, Cast, OneOf, arguments, call, match, value_of

GATE, UP = Capture("gate"), Capture("up")
SWIGLU = call("mul", call("silu", GATE), UP)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def last(function, *inputs) -> fx.Node:
    """The node that a function of tensors returns, in the graph Dynamo makes of it."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    (output,) = graphs[0].graph.find_nodes(op="output")
    return output.args[0][0]


def two() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4), torch.randn(2, 4)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda gate, up: F.silu(gate) * up,
        lambda gate, up: up * F.silu(gate, inplace=False),
        lambda gate, up: torch.mul(up, other=torch.nn.functional.silu(input=gate)),
        lambda gate, up: torch.nn.SiLU()(gate).mul(up),
        lambda gate, up: torch.multiply(F.silu(gate), up),
    ],
)
def test_spellings_of_one_expression(spelling):
    found = match(SWIGLU, last(spelling, *two()))
    assert "gate" in found["gate"].name
    assert "up" in found["up"].name
    assert len(found.nodes) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda gate, up: F.silu(gate) + up,
        lambda gate, up: F.gelu(gate) * up,
        lambda gate, up: F.silu(gate.clone(), inplace=True) * up,
        lambda gate, up: F.silu(gate),
        lambda gate, up: F.silu(gate).float() * up,
    ],
)
def test_other_expressions_do_not_match(other):
    assert match(SWIGLU, last(other, *(x.bfloat16() for x in two()))) is None


def test_a_name_twice_is_one_thing_twice():
    square = call("mul", GATE, GATE)
    assert match(square, last(lambda a, b: a * a, *two()))
    assert match(square, last(lambda a, b: a * b, *two())) is None


def test_commuted_operands_are_tried_until_all_captures_agree():
    pattern = call("add", call("mul", GATE, UP), GATE)
    found = match(pattern, last(lambda a, b: a * b + b, *two()))
    assert "b" in found["gate"].name


def test_casts_are_seen_through_where_the_pattern_says_so():
    def autocast_like(gate, up):
        return F.silu(gate.float()).to(torch.bfloat16) * up.type_as(gate)

    node = last(autocast_like, *(x.bfloat16() for x in two()))
    pattern = call("mul", Cast(call("silu", Cast(GATE))), UP)
    found = match(pattern, node)
    assert found["gate"].op == "placeholder"
    assert found["up"].target == "type_as"
    assert len(found.nodes) == 4
    assert match(SWIGLU, node) is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32])
def test_a_cast_that_loses_more_than_digits_is_none(dtype):
    node = last(lambda a: a.to(dtype).to(torch.float32), torch.randn(4))
    assert value_of(match(Cast(GATE), node)["gate"]).dtype == torch.float32
    assert match(Cast(call("silu", GATE)), node) is None


def test_constants_must_be_equal_and_defaults_hold():
    tanh = last(lambda a: F.gelu(a, approximate="tanh"), two()[0])
    assert match(call("gelu", GATE, "tanh"), tanh)
    assert match(call("gelu", GATE), tanh) is None
    assert match(call("gelu", GATE), last(lambda a: F.gelu(a), two()[0]))
    found = match(call("gelu", GATE, Capture("kind")), tanh)
    assert found["kind"] == "tanh"


def test_a_capture_may_ask_for_more():
    row = Capture("row", lambda node: value_of(node).shape[-1] == 1)
    pattern = call("mul", row, Capture("x"))
    x, r = torch.randn(2, 4), torch.randn(2, 1)
    assert value_of(match(pattern, last(lambda x, r: x * r, x, r))["row"]).shape == (2, 1)
    assert match(pattern, last(lambda x, r: x * x, x, r)) is None


def test_one_of_several():
    act = OneOf((call("silu", GATE), call("gelu", GATE, "tanh"), call("gelu", GATE)))
    for function in (F.silu, F.gelu):
        assert match(call("mul", act, UP), last(lambda a, b, f=function: f(a) * b, *two()))
    assert match(call("mul", act, UP), last(lambda a, b: F.relu(a) * b, *two())) is None


def test_arguments_of_another_operation_or_of_an_unknown_signature():
    node = last(lambda a: F.layer_norm(a, (4,), eps=1e-3), two()[0])
    x, shape, weight, bias, eps = arguments(node, "layer_norm")
    assert (x.op, tuple(shape), weight, bias, eps) == ("placeholder", (4,), None, None, 1e-3)
    assert arguments(node, "rms_norm") is None
    graph = fx.Graph()
    odd = graph.call_function(operator.mul, (1, 2, 3))
    assert arguments(odd, "mul") is None
    assert isinstance(call("mul", 1, 2), Call)
