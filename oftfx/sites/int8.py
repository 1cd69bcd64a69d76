"""bitsandbytes' int8 matmul in a graph: what tracers write down for it, and the one op it becomes.

    training, on a CPU               else
    w = rows.to(x.dtype)             q, s, columns = int8_vectorwise_quant(x.half(), threshold)
    w.mul_(scales/127)               y = int8_scaled_mm(q, rows, s, scales, bias, x.dtype)
    y = linear(x, w, bias)           y, _ = int8_mixed_scaled_mm(x, q, rows, s, scales, columns, …)
    weight.set_(rows)                weight.set_(rows)

    y = oftfx.int8_linear(x, weight, (out, in), scales, bias, threshold)

The rows are a constant beside the parameter, which is laid over them again after every matmul.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from oftfx.host import Host, call, erase
from oftfx.ops.int8_linear import INT8_LINEAR
from oftfx.sites.matmul import parameter_behind, spelling
from oftfx.sites.naming import caller

aten = torch.ops.aten

_QUANTISE = "bitsandbytes.int8_vectorwise_quant"
_SCALED = "bitsandbytes.int8_scaled_mm"
_MIXED = "bitsandbytes.int8_mixed_scaled_mm"
_PRODUCTS = {aten.mul_.Tensor, aten.mul.Tensor, operator.mul, "mul", "mul_"}
_UNSQUEEZES = {aten.unsqueeze.default, torch.unsqueeze, "unsqueeze"}
_LAYS = {aten.set_.source_Tensor, torch.Tensor.set_, "set_"}


class Form(NamedTuple):
    """One int8 matmul as it was traced.

    Attributes:
        x: What is multiplied.
        rows: The int8 rows.
        scales: Their scales.
        bias: What is added.
        threshold: As [`int8_linear`][oftfx.ops.int8_linear] takes it.
        y: The product.
        own: The nodes that are there for the product alone, in no order.
    """

    x: fx.Node
    rows: fx.Node
    scales: fx.Node
    bias: fx.Node | None
    threshold: float | None
    y: fx.Node
    own: tuple[fx.Node, ...]


class Operands(NamedTuple):
    """What the op takes, in its own order; nodes or their values.

    Attributes:
        A: x, (…, in).
        B: W's rows, int8.
        shapeB: (out, in).
        scales: (out,).
        bias: (out,).
        threshold: As [`int8_linear`][oftfx.ops.int8_linear] takes it.
    """

    A: Any
    B: Any
    shapeB: Any  # noqa: N815  (as the 4-bit op names it)
    scales: Any
    bias: Any
    threshold: Any

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of the operands that W is stored in."""
        return ("B", "scales")

    def weight(self) -> Tensor:
        """W, (out, in), float32."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(self.B, self.scales)

    def requantised(self, weight: Tensor) -> dict[str, Tensor]:
        """What the op takes to multiply by another W, (out, in), by the operands' names."""
        from bitsandbytes.functional import int8_vectorwise_quant

        rows, scales, _ = int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return {"B": rows, "scales": scales}


def operands(node: fx.Node) -> Operands | None:
    """What a node of the op takes; None for other nodes."""
    if node.target is not INT8_LINEAR:
        return None
    return Operands(*node.args, **node.kwargs)


class _Scaled(NamedTuple):
    A: Any
    B: Any
    row_stats: Any
    col_stats: Any
    bias: Any = None
    dtype: Any = None


class _Mixed(NamedTuple):
    A: Any
    CA: Any
    CB: Any
    SCA: Any
    SCB: Any
    outlier_cols: Any = None
    bias: Any = None


def form(node: fx.Node) -> Form | None:
    """The int8 matmul that this node does, if it does one."""
    if _calls(node, _SCALED):
        scaled = _Scaled(*node.args, **node.kwargs)
        if (rounding := _rounding(scaled.A)) is None:
            return None
        quantise, threshold = rounding
        x = quantise.all_input_nodes[0]
        if scaled.dtype not in (None, torch.float16):
            x = x.all_input_nodes[0]  # before it was cast to be rounded
        own = (node, scaled.A, scaled.row_stats, quantise)
        return Form(x, scaled.B, scaled.col_stats, scaled.bias, threshold, node, own)
    if _calls(node, _MIXED):
        mixed = _Mixed(*node.args, **node.kwargs)
        if (rounding := _rounding(mixed.CA)) is None:
            return None
        quantise, threshold = rounding
        y = next(user for user in node.users if user.args[1] == 0)
        return Form(mixed.A, mixed.CB, mixed.SCB, mixed.bias, threshold, y, (node, quantise))
    return _unrounded(node)


def _calls(node: fx.Node, op: str) -> bool:
    return node.op == "call_function" and str(node.target).removesuffix(".default") == op


def _rounding(numbers: fx.Node) -> tuple[fx.Node, float] | None:
    """What rounded x to these numbers, and its threshold; None where that is not in the graph."""
    quantise = numbers.all_input_nodes[0] if numbers.all_input_nodes else numbers
    if not _calls(quantise, _QUANTISE):
        return None
    given = quantise.args[1] if len(quantise.args) > 1 else quantise.kwargs.get("threshold", 0.0)
    return quantise, float(given)  # type: ignore[arg-type]


def _unrounded(node: fx.Node) -> Form | None:
    """A matmul by ``rows.to(x.dtype)·(scales[:, None]/127)``."""
    spelled = spelling(node)
    w = None if spelled is None else spelled.w.of(node)
    if spelled is None or w is None:
        return None
    product, swapped = parameter_behind(w)
    if product.target not in _PRODUCTS or spelled.out_in == swapped:
        return None
    rows, factor = (*product.args, None)[:2]
    if not isinstance(rows, fx.Node) or not isinstance(factor, fx.Node):
        return None
    wide, step = (*factor.args, None)[:2]
    if factor.target not in _PRODUCTS or step != 1.0 / 127.0 or not isinstance(wide, fx.Node):
        return None
    x = spelled.x.of(node)
    if wide.target not in _UNSQUEEZES or wide.args[1] != 1 or x is None:
        return None
    bias = None if spelled.bias is None else spelled.bias.of(node)
    return Form(x, rows, wide.all_input_nodes[0], bias, None, node, (node,))


def _lays(node: fx.Node) -> bool:
    """Whether a node lays a tensor over another one's memory, as a layer does after its matmul."""
    return node.op in ("call_function", "call_method") and node.target in _LAYS


def is_part(region: fx.Graph) -> bool:
    """Whether gradients are off in a region for a layer's matmul, or for what follows it.

    A `no_grad` of the user's would hold both.
    """
    rows = (node.args[1] for node in region.nodes if _lays(node))
    laid = any(getattr(r.meta.get("val"), "dtype", None) is torch.int8 for r in rows)
    return held(region) != laid


def held(graph: fx.Graph) -> bool:
    """Whether a graph does an int8 matmul that is not one op, or multiplies rounded numbers."""
    rounded = (_SCALED, _MIXED)
    return any(form(n) is not None or any(_calls(n, op) for op in rounded) for n in graph.nodes)


def unite(host: Host) -> None:
    """Makes each int8 matmul one op over its layer's parameter, as far as that is in the graph."""
    read = set()
    for node in list(host.module.graph.nodes):
        found = form(node)
        weight = None if found is None else _parameter(host, found)
        if found is not None and weight is not None:
            _replace(host, found, weight)
            read.add(weight)
    for node in list(host.module.graph.nodes):
        if _lays(node) and node.args[0] in read:
            around = node.prev, node.next  # a graph of Dynamo's turns gradients off and on for it
            switches = around if all(n.target is torch._C._set_grad_enabled for n in around) else ()
            erase(host, (node, *switches))


def _replace(host: Host, found: Form, weight: fx.Node) -> None:
    graph, rows = host.module.graph, _start(found.rows)
    shape = list(host.held(rows).shape)  # type: ignore[union-attr]
    with graph.inserting_before(found.y):
        fresh = call(
            graph, INT8_LINEAR, found.x, weight, shape, found.scales, found.bias, found.threshold
        )
    kept = ("stack_trace", "nn_module_stack", "example_value")
    fresh.meta |= {key: found.y.meta[key] for key in kept if key in found.y.meta}
    found.y.replace_all_uses_with(fresh)
    erase(host, found.own)


def _parameter(host: Host, found: Form) -> fx.Node | None:
    """The node that reads the parameter whose bytes the rows are.

    It is told by its name, or else by its memory; a strict export gives `weight.data` no values.
    """
    value, name = host.held(_start(found.rows)), f"{caller(found.y)}.weight".lstrip(".")
    if value is None or value.dtype is not torch.int8:
        return None
    alike = None
    empty = isinstance(value, FakeTensor)
    for reader, called in host.readers().items():
        weight = host.held(reader)
        if weight is None or (weight.dtype, weight.shape) != (value.dtype, value.shape):
            continue
        if called == name and (empty or torch.equal(weight, value)):
            return reader
        if not empty and weight.data_ptr() == value.data_ptr():
            alike = reader
    return alike


def _start(rows: fx.Node) -> fx.Node:
    """Where rows come from, behind casts and what a tracer writes for ``.data``."""
    node, _ = parameter_behind(rows)
    while getattr(node.target, "__name__", "") == "_get_data_attr":
        node, _ = parameter_behind(node.all_input_nodes[0])
    return node
