"""What every walk over a graph asks of its nodes."""

from collections.abc import Iterable

import torch
from torch import fx

CAST_NOTE = torch.ops.aten._assert_tensor_metadata.default
"""What export notes beside a cast; it reads no values."""


def behind(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and everything they are made from."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def body_of(graph: fx.GraphModule | None, node: fx.Node) -> fx.GraphModule | None:
    """The graph that a node hands to a higher-order op (a checkpointed or repeated region)."""
    body = getattr(graph, str(node.target), None) if node.op == "get_attr" else None
    return body if isinstance(body, fx.GraphModule) else None
