"""Weights that a graph reads in 4 bits: their floats, and what is stored in place of them.

before                                                     after
y = gemm_4bit(x, packed, (out, in), absmax, …, bias)       y = linear(x, W', bias)
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from oftfx.errors import MergeError
from oftfx.host import Host, call
from oftfx.insert import values_of
from oftfx.sites import gemm_4bit, linear
from oftfx.sites.gemm_4bit import Operands
from oftfx.sites.matmul import parameter_behind

aten = torch.ops.aten


def floats(host: Host, node: fx.Node, fqn: str) -> Tensor:
    """The weight that a 4-bit matmul reads, float32, (out, in).

    Raises:
        MergeError: It is not finite.
    """
    given: Operands = values_of(host, gemm_4bit.operands(node)._replace(A=None, bias=None), fqn)
    weight = Operands(*given).weight()
    if not torch.isfinite(weight).all():
        raise MergeError(f"{fqn}: its quantised weight is not finite; its quant state is damaged.")
    return weight


def check_readers(host: Host, node: fx.Node, fqn: str) -> None:
    """That what a 4-bit matmul reads can be replaced.

    Raises:
        MergeError: The graph computes it.
    """
    if any(host.held(reader) is None for reader in _readers(node).values()):
        raise MergeError(f"{fqn}: this graph computes its quant state: merge to floats instead.")


def repack(host: Host, nodes: list[fx.Node], weight: Tensor, fqn: str) -> Tensor:
    """Stores another weight, (out, in), in 4 bits; what it is then, float32."""
    for node in nodes:
        values: dict[str, Any] = {n: host.held(reader) for n, reader in _readers(node).items()}
        fresh = gemm_4bit.operands(node)._replace(A=None, bias=None, **values).requantised(weight)
        for name, reader in _readers(node).items():
            held = values[name]
            value = fresh[name].view(held.shape)
            is_parameter = isinstance(held, nn.Parameter)
            host.hold(reader, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    return floats(host, nodes[0], fqn)


def unpack(host: Host, nodes: list[fx.Node], weight: Tensor) -> None:
    """Makes 4-bit matmuls ordinary ones by this weight, (out, in), in the dtype of their input."""
    parameter = nn.Parameter(weight, requires_grad=False)
    for node in nodes:
        readers = _readers(node)
        packed, views = readers.pop("B"), _views(gemm_4bit.operands(node).B)
        host.hold(packed, parameter)
        _multiply(host, node, packed, parameter.dtype)
        for view in views:
            if not view.users:
                host.module.graph.erase_node(view)
        for reader in dict.fromkeys(readers.values()):
            if not reader.users and host.held(reader) is not None:
                host.drop(reader)


def _multiply(host: Host, node: fx.Node, weight: fx.Node, dtype: torch.dtype) -> None:
    """Puts an ordinary matmul in a 4-bit one's place."""
    graph, given = host.module.graph, gemm_4bit.operands(node)
    with graph.inserting_before(node):
        x = given.A.meta.get("val", given.A.meta.get("example_value"))
        if getattr(x, "dtype", None) is not dtype:
            weight = call(graph, aten.to.other, weight, given.A)
        bias = () if given.bias is None else (given.bias,)
        fresh = call(graph, aten.linear.default, given.A, weight, *bias)
    fresh.meta |= {k: node.meta[k] for k in ("stack_trace", "nn_module_stack") if k in node.meta}
    if stack := dict(fresh.meta.get("nn_module_stack", {})):
        owner = next(reversed(stack))
        fresh.meta["nn_module_stack"] = stack | {owner: (stack[owner][0], linear.CLASS)}
    node.replace_all_uses_with(fresh)
    graph.erase_node(node)


def _readers(node: fx.Node) -> dict[str, fx.Node]:
    """What reads the weight and its quant state, by the names of the op's operands."""
    given = gemm_4bit.operands(node)._asdict()
    tensors = {name: given[name] for name in gemm_4bit.STORED if given[name] is not None}
    return {name: parameter_behind(tensor)[0] for name, tensor in tensors.items()}


def _views(node: fx.Node) -> list[fx.Node]:
    """The nodes between a packed weight and what multiplies by it."""
    start, path = parameter_behind(node)[0], []
    while node is not start:
        path.append(node)
        node = node.all_input_nodes[0]
    return path
