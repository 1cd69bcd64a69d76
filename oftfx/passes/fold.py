"""A weight is folded where that costs less than rotating the input of its matmul.

    before                          after
    x_r = rotate(x, C)              y, _ = folded_linear(x, C, W, b)
    y = linear(x_r, W, b)

by the rule of eager training steps, [`fold_from`][oftfx.ops.cost.fold_from]: the layers that read
one x fold together or not at all, those that share a rotation do not, nor those that another
adapter turns or whose outputs are scaled. Where `oftfx::frozen_linear` has a faster product, for
which a folded weight is not taken, nothing folds of itself. The weight is frozen, and nothing else
reads x_r. Rows whose number the compiler does not know count as the fewest that it knows of.

What has no gradient is left: without one a core is kept from call to call, and a weight is merged.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from oftfx.nodes import behind
from oftfx.ops.cost import ALL, fold_from
from oftfx.ops.factor import MAPS, SCALE
from oftfx.ops.folded_linear import FOLDED_LINEAR
from oftfx.ops.frozen_linear import served
from oftfx.passes.effects import epochs
from oftfx.passes.group import source
from oftfx.passes.pattern import arguments, is_block_rotation, matrix_and_bias, plain, value_of


class _Layer(NamedTuple):
    """A rotation, the matmul that alone reads what it gives, and the operands of both."""

    rotation: fx.Node
    linear: fx.Node
    x: fx.Node
    core: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def fold(graph: fx.GraphModule) -> int:
    """Folds the weights of layers for which that costs less; returns how many."""
    epoch = epochs(graph.graph)
    readers: dict[Any, list[fx.Node]] = {}
    for node in epoch:
        if node.target in MAPS:
            readers.setdefault((epoch[node], source(node.args[0])), []).append(node)
    folded = 0
    for rotations in readers.values():
        layers = [layer for layer in map(_layer, rotations) if layer and _is_foldable(layer)]
        # The op reads x where the matmul was, not where the rotation was.
        together = len({epoch[node] for layer in layers for node in layer[:2]}) == 1
        if len(layers) == len(rotations) and together and _costs_less(layers):
            for layer in layers:
                _fold(graph.graph, layer)
            folded += len(layers)
    return folded


def _layer(rotation: fx.Node) -> _Layer | None:
    """The layer whose input is turned, by blocks, for it alone and by this rotation alone."""
    operands: Any = rotation.args
    x, core, *_ = operands
    if not is_block_rotation(rotation) or len(rotation.users) != 1:
        return None
    (linear,) = rotation.users
    given = arguments(linear, "linear")
    if given is None or given[0] is not rotation or _uncast(x).target in MAPS:
        return None
    if any(user.target is SCALE for user in linear.users):
        return None
    return _Layer(rotation, linear, x, core, *given[1:])


def _uncast(x: Any) -> fx.Node:
    """What autocast's casts of a tensor start from."""
    while x.op == "call_method" and x.target == "to":
        x = x.args[0]
    return x


def _is_foldable(layer: _Layer) -> bool:
    """Whether the op computes the same, in a training step that leaves the weight as it is."""
    turned, y, core = plain(layer.rotation), plain(layer.linear), plain(layer.core)
    held = matrix_and_bias(layer.weight, layer.bias)
    if turned is None or y is None or core is None or held is None:
        return False
    weight, *_ = held
    sizes = (*core.shape, *weight.shape)
    return (
        turned.requires_grad
        and not weight.requires_grad
        and turned.dtype == y.dtype  # else autocast's, which the op has no part in
        and all(isinstance(size, int) for size in sizes)
        and core.shape[0] * core.shape[1] == weight.shape[1]
    )


def _costs_less(layers: Sequence[_Layer]) -> bool:
    """Whether folding the weights of all that read one x does."""
    if len({_inputs(layer.core) for layer in layers}) < len(layers):
        return False  # they share a rotation
    found: list[Any] = [
        [value_of(node) for node in (layer.rotation, layer.core, layer.weight)] for layer in layers
    ]
    outs = tuple(weight.shape[0] for _, _, weight in found)
    for x, core, weight in found:
        least = fold_from(outs, core.shape[-1], x.dtype, x.device)
        if least is None or not statically_known_true(x.numel() >= least * x.shape[-1]):
            return False
        if least > ALL and served(x, weight):
            return False  # a turned x is multiplied faster than by the library of merged models
    return True


def _inputs(node: fx.Node) -> frozenset[fx.Node]:
    """What a graph computes a node from: the parameters, where it is a core."""
    return frozenset(each for each in behind([node]) if each.op in ("placeholder", "get_attr"))


def _fold(graph: fx.Graph, layer: _Layer) -> None:
    with graph.inserting_before(layer.linear):
        both = graph.call_function(FOLDED_LINEAR, layer[2:])
        y = graph.call_function(operator.getitem, (both, 0))
    y.meta = layer.linear.meta
    layer.linear.replace_all_uses_with(y)
    graph.erase_node(layer.linear)
    graph.erase_node(layer.rotation)
