"""A product with a frozen weight, and its gradient, take the faster of PyTorch's libraries.

    before                          after
    y = linear(x, W, b)             y = frozen_linear(x, W, b)

in a training step in float32 on a CPU where that gains (see `oftfx::frozen_linear`, which looks at
the number of rows when it runs). What has no gradient is left, as in an eager model.
"""

from torch import fx

from oftfx.ops.frozen_linear import FROZEN_LINEAR, served
from oftfx.passes.pattern import arguments, matrix_and_bias, plain


def multiply(graph: fx.GraphModule) -> int:
    """Replaces the products for which that is faster; returns how many."""
    replaced = 0
    for node in list(graph.graph.nodes):
        given = arguments(node, "linear")
        if given is None or not _is_frozen(node, *given):
            continue
        with graph.graph.inserting_before(node):
            y = graph.graph.call_function(FROZEN_LINEAR, given)
        y.meta = node.meta
        node.replace_all_uses_with(y)
        graph.graph.erase_node(node)
        replaced += 1
    return replaced


def _is_frozen(linear: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> bool:
    y, given, held = plain(linear), plain(x), matrix_and_bias(weight, bias)
    if y is None or given is None or held is None or not y.requires_grad or held[0].requires_grad:
        return False
    return served(given, *held) and y.dtype == given.dtype  # else autocast's
