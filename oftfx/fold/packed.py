"""Weights that a graph reads packed: their floats, and what is stored in place of them.

before                                                     after
y = gemm_4bit(x, packed, (out, in), absmax, …, bias)       y = linear(x, W', bias)
y = linear(x, dequantize_4bit(packed, absmax, …), bias)
y = int8_linear(x, rows, (out, in), scales, bias, …)
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from oftfx.errors import MergeError
from oftfx.host import Host, call, erase
from oftfx.inserted import values_of
from oftfx.sites import gemm_4bit, int8, linear
from oftfx.sites.matmul import packed_operands, parameter_behind

aten = torch.ops.aten

Operands = gemm_4bit.Operands | int8.Operands


def operands(node: fx.Node) -> Operands | None:
    """What a matmul by a packed weight takes; None for other nodes."""
    return int8.operands(node) or packed_operands(node)


def floats(host: Host, node: fx.Node, fqn: str) -> Tensor:
    """The weight that a matmul reads packed, float32, (out, in).

    Raises:
        MergeError: It is not finite.
    """
    taken = _operands(node)
    weight = type(taken)(*values_of(host, taken._replace(A=None, bias=None), fqn)).weight()
    if not torch.isfinite(weight).all():
        raise MergeError(f"{fqn}: its quantised weight is not finite; its quant state is damaged.")
    return weight


def check_readers(host: Host, node: fx.Node, fqn: str) -> None:
    """That what a matmul reads packed can be replaced.

    Raises:
        MergeError: The graph computes it.
    """
    if any(host.held(reader) is None for reader in _readers(node).values()):
        raise MergeError(f"{fqn}: this graph computes its quant state: merge to floats instead.")


def repack(host: Host, nodes: list[fx.Node], weight: Tensor, fqn: str) -> Tensor:
    """Stores another weight, (out, in), packed; what it is then, float32."""
    for node in nodes:
        values: dict[str, Any] = {n: host.held(reader) for n, reader in _readers(node).items()}
        fresh = _operands(node)._replace(A=None, bias=None, **values).requantised(weight)
        for name, reader in _readers(node).items():
            held = values[name]
            value = fresh[name].view(held.shape)
            is_parameter = isinstance(held, nn.Parameter)
            host.hold(reader, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    return floats(host, nodes[0], fqn)


def unpack(host: Host, nodes: list[fx.Node], weight: Tensor) -> None:
    """Makes matmuls of packed weights ordinary ones by this, (out, in), in their inputs' dtype."""
    parameter = nn.Parameter(weight, requires_grad=False)
    for node in nodes:
        packed = _readers(node)["B"]
        host.hold(packed, parameter)
        _multiply(host, node, packed, parameter.dtype)
        erase(host, (node,))


def _multiply(host: Host, node: fx.Node, weight: fx.Node, dtype: torch.dtype) -> None:
    """Puts an ordinary matmul in a packed one's place; that is left without a reader."""
    graph, given = host.module.graph, _operands(node)
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


def _operands(node: fx.Node) -> Operands:
    found = operands(node)
    assert found is not None, f"{node} reads no packed weight"
    return found


def _readers(node: fx.Node) -> dict[str, fx.Node]:
    """What reads the weight and its quant state, by the names of the op's operands."""
    taken = _operands(node)
    given = taken._asdict()
    tensors = {name: given[name] for name in taken.stored if given[name] is not None}
    return {name: parameter_behind(tensor)[0] for name, tensor in tensors.items()}
