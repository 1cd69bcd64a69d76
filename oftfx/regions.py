"""Regions that a tracer closed to gradients although the ops in them have one.

    before                                            after
    y = wrap_with_set_grad_enabled(False, body, x, …)     y = gemm_4bit(x, …)
    body: gemm_4bit(x, …)

An autograd function runs its forward with gradients off, and its backward is not in an exported
graph. So a quantised layer's matmul would end the gradient of all that comes before it.
"""

from typing import Any, TypeVar

import torch
from torch import fx
from torch.export import ExportedProgram

from oftfx.host import host_of
from oftfx.sites import bitsandbytes

M = TypeVar("M", bound=fx.GraphModule | ExportedProgram)


def differentiable(model: M) -> M:
    """Opens the closed regions that hold a quantised matmul and nothing of the user's.

    Args:
        model: A GraphModule, changed in place; or an ExportedProgram, of which a copy is returned
            that shares its tensors, unless there is nothing to open.
    """
    if not _closed(model.graph_module if isinstance(model, ExportedProgram) else model):
        if _quantised(model.graph):
            bitsandbytes.register_gradients()
        return model
    bitsandbytes.register_gradients()
    host = host_of(model, edit=True)
    for node in _closed(host.module):
        _open(host.module, node)
    finished: M = host.finish()
    return finished


def _closed(module: fx.GraphModule) -> list[fx.Node]:
    wrapped = torch.ops.higher_order.wrap_with_set_grad_enabled
    found = module.graph.find_nodes(op="call_function", target=wrapped)
    return [n for n in found if n.args[0] is False and _quantised(_body(module, n).graph)]


def _body(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    body = node.args[1]
    assert isinstance(body, fx.Node)
    inner = module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    return inner


def _quantised(graph: fx.Graph) -> bool:
    return any(str(node.target) in bitsandbytes.OPS for node in graph.nodes)


def _open(module: fx.GraphModule, node: fx.Node) -> None:
    """Puts a region's nodes in its place."""
    body, graph = _body(module, node).graph, module.graph
    holder = node.args[1]
    assert isinstance(holder, fx.Node)
    inputs = dict(zip(body.find_nodes(op="placeholder"), node.args[2:], strict=True))
    with graph.inserting_before(node):
        outputs: Any = graph.graph_copy(body, inputs)
    for user in list(node.users):  # getitem of the tuple that a region returns
        user.replace_all_uses_with(outputs[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not holder.users:
        graph.erase_node(holder)
        module.delete_submodule(str(holder.target))
