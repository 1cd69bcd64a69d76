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

from oftfx.errors import PlanError
from oftfx.host import host_of
from oftfx.sites import bitsandbytes

M = TypeVar("M", bound=fx.GraphModule | ExportedProgram)


def differentiable(model: M) -> M:
    """Lets gradients through the 4-bit layers of an exported model, as they go through the module.

    Tracing closes the matmul of a `bitsandbytes` layer to gradients; this opens it.

    Args:
        model: A GraphModule, changed in place; or an ExportedProgram, of which a copy is returned
            that shares its tensors, unless there is nothing to open.

    Raises:
        PlanError: The model holds int8 layers, whose gradient no graph has.
    """
    module = _module(model)
    _check_rounding(module)
    if closed(module) or _holds(module.graph, bitsandbytes.OPS):
        bitsandbytes.register_gradients()
    if not closed(module):
        return model
    host = host_of(model, edit=True)
    for node in closed(host.module):
        _open(host.module, node)
    finished: M = host.finish()
    return finished


def check_differentiable(model: fx.GraphModule | ExportedProgram) -> None:
    """That gradients get through every quantised layer of a graph.

    Raises:
        PlanError: They do not; says what to do.
    """
    _check_rounding(_module(model))
    if closed(_module(model)):
        raise PlanError(
            "this graph's 4-bit layers were exported closed to gradients, so rotations before them "
            "would not train: open them first, program = oftfx.differentiable(program)."
        )


def _module(model: fx.GraphModule | ExportedProgram) -> fx.GraphModule:
    return model.graph_module if isinstance(model, ExportedProgram) else model


def _check_rounding(module: fx.GraphModule) -> None:
    bodies = (body for body in module.modules() if isinstance(body, fx.GraphModule))
    if any(_holds(body.graph, bitsandbytes.ROUNDING) for body in bodies):
        raise PlanError(
            "this graph holds int8 layers that round their activations, whose gradient is not in "
            "an exported graph: train the nn.Module, and export it merged."
        )


def closed(module: fx.GraphModule) -> list[fx.Node]:
    """The regions of a graph that hold a 4-bit matmul and let no gradient through."""
    wrapped = torch.ops.higher_order.wrap_with_set_grad_enabled
    found = module.graph.find_nodes(op="call_function", target=wrapped)
    no_grad = (node for node in found if node.args[0] is False)
    return [node for node in no_grad if _is_autograd_function(_body(module, node).graph)]


def _is_autograd_function(body: fx.Graph) -> bool:
    """Whether a region is what a layer's autograd function runs, and no `no_grad` of the user's.

    That one would hold the layer's whole forward, which ends in a cast.
    """
    (outputs,) = body.output_node().args
    ends = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    is_matmul = any(
        str(end.target) in bitsandbytes.MATMULS for end in ends if isinstance(end, fx.Node)
    )
    return is_matmul and _holds(body, bitsandbytes.OPS)


def _body(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    body = node.args[1]
    assert isinstance(body, fx.Node)
    inner = module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    return inner


def _holds(graph: fx.Graph, ops: tuple[str, ...]) -> bool:
    return any(str(node.target) in ops for node in graph.nodes)


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
