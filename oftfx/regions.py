"""Regions that a tracer closed to gradients although the ops in them have one.

    before                                            after
    y = wrap_with_set_grad_enabled(False, body, x, …)     y = gemm_4bit(x, …)
    body: gemm_4bit(x, …)

An autograd function runs its forward with gradients off, and its backward is not in an exported
graph. So a quantised layer's matmul would end the gradient of all that comes before it. A graph of
Dynamo's own keeps the backward, `autograd_function_apply(forward, backward, x, …)`, but hides the
matmul in there from what looks for it; it is opened in the same way. Of int8 layers there are
several ops in a region, without a gradient even when it is open: `sites/int8.py` makes them one.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import fx
from torch.export import ExportedProgram

from oftfx.errors import PlanError
from oftfx.host import host_of
from oftfx.sites import bitsandbytes, gemm_4bit, int8
from oftfx.sites.matmul import spelling

M = TypeVar("M", bound=fx.GraphModule | ExportedProgram)


def differentiable(model: M) -> M:
    """Lets gradients through the quantised layers of an exported model, as through a module's.

    Tracing closes the matmul of a `bitsandbytes` layer to gradients; this opens it.

    Args:
        model: A GraphModule, changed in place; or an ExportedProgram, of which a copy is returned
            that shares its tensors, unless there is nothing to open.

    Raises:
        PlanError: The model holds int8 layers whose weight is not among its parameters.
    """
    module = _module(model)
    if _closed(module) or _holds(module.graph, bitsandbytes.OPS):
        gemm_4bit.register_gradients()
    if not opens(module):
        return model
    host = host_of(model, edit=True)
    for node in _closed(host.module):
        _open(host.module, node)
    int8.unite(host)
    _check_united(host.module)
    finished: M = host.finish()
    return finished


def opens(module: fx.GraphModule) -> bool:
    """Whether there is something in a graph for [`differentiable`][oftfx.differentiable] to do."""
    return bool(_closed(module)) or _holds_int8(module)


def check_differentiable(model: fx.GraphModule | ExportedProgram) -> None:
    """That gradients get through every quantised layer of a graph.

    Raises:
        PlanError: They do not; says what to do.
    """
    if opens(_module(model)):
        raise PlanError(
            "this graph's quantised layers were exported closed to gradients, so rotations before "
            "them would not train: open them first, program = oftfx.differentiable(program)."
        )


def _module(model: fx.GraphModule | ExportedProgram) -> fx.GraphModule:
    return model.graph_module if isinstance(model, ExportedProgram) else model


def _check_united(module: fx.GraphModule) -> None:
    if _holds_int8(module):
        raise PlanError(
            "this graph holds int8 layers whose weight is not among its parameters, or which are "
            "in a region of their own, so that they cannot be rotated: adapt and train the "
            "nn.Module, and export it merged."
        )


def _holds_int8(module: fx.GraphModule) -> bool:
    """Whether an int8 matmul is in a graph, or in a region that gradients go through."""
    if int8.held(module.graph):
        return True
    closed = {holder.target for node in _regions(module.graph) for holder in _holders(node)}
    return any(
        _holds_int8(body)
        for name, body in module.named_children()
        if isinstance(body, fx.GraphModule) and name not in closed
    )


def _closed(module: fx.GraphModule) -> list[fx.Node]:
    """The regions of a graph that hold a quantised matmul and let no gradient or rotation through.

    A region is one where it holds what a layer's autograd function runs. A `no_grad` of the user's
    would hold the layer's whole forward, which ends in a cast.
    """
    return [node for node in _regions(module.graph) if _multiplies(_body(module, node).graph)]


def _regions(graph: fx.Graph) -> Iterator[fx.Node]:
    higher = torch.ops.higher_order
    for node in graph.find_nodes(op="call_function", target=higher.wrap_with_set_grad_enabled):
        if node.args[0] is False:
            yield node
    yield from graph.find_nodes(op="call_function", target=higher.autograd_function_apply)


def _multiplies(body: fx.Graph) -> bool:
    if int8.is_part(body):
        return True
    ends = _result(body)
    ends = ends if isinstance(ends, (tuple, list)) else (ends,)
    is_matmul = any(isinstance(end, fx.Node) and spelling(end) is not None for end in ends)
    return is_matmul and _holds(body, bitsandbytes.OPS)


def _result(body: fx.Graph) -> Any:
    """What a region gives: of an autograd function's forward, not what it saves."""
    (outputs,) = body.output_node().args
    is_forward = body.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    return outputs[0] if is_forward else outputs  # type: ignore[index]


def _needed(body: fx.Graph) -> set[fx.Node]:
    """The nodes of a region that its result or an effect depends on; not those that switch grad."""
    needed: set[fx.Node] = set()
    fx.node.map_arg(_result(body), needed.add)
    for node in reversed(body.nodes):
        effect = node.op == "call_function" and node.is_impure()
        if node in needed or (effect and node.target is not torch._C._set_grad_enabled):
            needed.update((node, *node.all_input_nodes))
    return needed


def _holders(node: fx.Node) -> list[fx.Node]:
    """The nodes that hold a region's graphs: its body, and of an autograd function the backward."""
    return [given for given in node.args[:2] if isinstance(given, fx.Node)]


def _body(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    inner = module.get_submodule(str(_holders(node)[0].target))
    assert isinstance(inner, fx.GraphModule)
    return inner


def _holds(graph: fx.Graph, ops: tuple[str, ...]) -> bool:
    return any(str(node.target) in ops for node in graph.nodes)


def _open(module: fx.GraphModule, node: fx.Node) -> None:
    """Puts a region's nodes in its place."""
    body, graph = _body(module, node).graph, module.graph
    copies: dict[fx.Node, Any] = dict(
        zip(body.find_nodes(op="placeholder"), node.args[2:], strict=True)
    )
    needed = _needed(body)
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner in needed and inner not in copies:
                copies[inner] = graph.node_copy(inner, copies.__getitem__)
    result = fx.node.map_arg(_result(body), copies.__getitem__)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    for user in list(node.users):  # getitem of the tuple that a region returns
        user.replace_all_uses_with(result[user.args[1]])
        graph.erase_node(user)
    holders = _holders(node)
    graph.erase_node(node)
    for holder in holders:
        if not holder.users:
            graph.erase_node(holder)
            module.delete_submodule(str(holder.target))
