"""The product of a gated MLP is turned where it is made, and never written.

    before                          after
    a = act(gate)                   y = glu_rotate(gate, up, C, "act")
    h = a * up
    y = rotate(h, C)

for the activations of `glu_rotate`. Where a layer has no gate, ``rotate(act(x), C)`` becomes the
same op without ``up``.

What something else reads too stays as it is. So does what no kernel serves, and the compiler does
better in parts: `counters["oftfx"]["products_left"]` says how often.
"""

import math
from typing import Any, NamedTuple

from torch import fx
from torch._dynamo.utils import counters

from oftfx.ops.glu_rotate import GLU_ROTATE, served
from oftfx.passes.effects import epochs
from oftfx.passes.pattern import (
    Capture,
    Cast,
    OneOf,
    call,
    has_shape,
    is_block_rotation,
    match,
    value_of,
)

_GATE, _UP = Capture("gate"), Capture("up")
_CUBIC = call("add", _GATE, call("mul", 0.044715, call("pow", _GATE, 3.0)))
_TANH = call("add", 1.0, call("tanh", call("mul", math.sqrt(2.0 / math.pi), _CUBIC)))
_RELU = call("relu", _GATE)
_ACTIVATIONS = {
    "silu": call("silu", _GATE),
    "gelu": call("gelu", _GATE),
    # As one function, and as GPT-2 spells it out.
    "gelu_tanh": OneOf(
        (call("gelu", _GATE, "tanh"), call("mul", call("mul", 0.5, _GATE), _TANH)),
    ),
    "relu": _RELU,
    "relu2": OneOf((call("square", _RELU), call("pow", _RELU, 2))),
}


class _Product(NamedTuple):
    """``act(gate)·up`` as it stands in a graph, and the nodes that compute it, the last first."""

    gate: fx.Node
    up: fx.Node | None
    activation: str
    nodes: tuple[fx.Node, ...]


def fuse_glu(graph: fx.GraphModule) -> int:
    """Fuses the rotations of gated products with them; returns how many."""
    epoch = epochs(graph.graph)
    fused = 0
    for node in filter(is_block_rotation, epoch):
        found = _product(node)
        # The op reads gate and up where the rotation was.
        if found is None or len({epoch[one] for one in (*found.nodes, node)}) > 1:
            continue
        if any(not {*found.nodes, node}.issuperset(one.users) for one in found.nodes):
            continue
        if _served(node, found):
            _fuse(graph.graph, node, found)
            fused += 1
        else:
            counters["oftfx"]["products_left"] += 1
    return fused


def _product(rotation: fx.Node) -> _Product | None:
    """What a rotation turns, if that is an activation or an activation times a tensor."""
    x = rotation.args[0]
    for name, activation in _ACTIVATIONS.items():
        for pattern in (activation, call("mul", activation, _UP)):
            found = match(Cast(pattern), x)
            if found is None:
                continue
            gate, up = found["gate"], found.captured.get("up")
            if up in found.nodes:  # an activation times itself: what the op reads has to stay
                continue
            # Nothing is broadcast, and no cast rounds.
            if all(_alike(gate, one) for one in (up or gate, *found.nodes)):
                return _Product(gate, up, name, found.nodes)
    return None


def _alike(a: Any, b: Any) -> bool:
    """Whether two tensors have one dtype and, for sure, one shape: no guard comes from here."""
    one, other = value_of(a), value_of(b)
    if one is None or other is None or one.dtype != other.dtype:
        return False
    return has_shape(b, one.shape)


def _served(rotation: fx.Node, found: _Product) -> bool:
    """Whether one kernel does it all; without, the compiler's product and a rotation are faster."""
    gate, core = value_of(found.gate), value_of(rotation.args[1])
    return gate is not None and core is not None and served(gate, core, found.activation)


def _fuse(graph: fx.Graph, rotation: fx.Node, found: _Product) -> None:
    with graph.inserting_before(rotation):
        args = (found.gate, found.up, rotation.args[1], found.activation)
        fused = graph.call_function(GLU_ROTATE, args)
    fused.meta = rotation.meta
    rotation.replace_all_uses_with(fused)
    for node in (rotation, *found.nodes):
        graph.erase_node(node)
