"""Rotations of a norm become one op with it, which writes what they give and nothing else.

    before                                    after
    h = x.float()                             h = x.float()
    r = rsqrt(h.pow(2).mean(-1) + eps)        r = rsqrt(h.pow(2).mean(-1) + eps)
    y = weight * (h * r).to(x.dtype)          x_q, x_k, x_v = norm_rotate(
    x_q, x_k, x_v = rotate_group(y, [C_q …])      x, None, r, weight, None, [C_q, C_k, C_v])

What one rotation gives is handed to each of its readers, where a kernel serves so many, by itself:
their gradients are then added where they are turned back, not in a pass before that.

The statistics stay nodes, for the compiler to compute where x is written. Anything that scales rows
and then columns is such a norm, whichever way its rows' numbers came about; `F.rms_norm` and
`F.layer_norm` are taken apart into statistics and the op. What else reads y still does, and y stays
if anything does. A norm that is trained, and what no kernel serves, is left to the compiler:
`counters["oftfx"]["norms_left"]` says how often.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._dynamo.utils import counters

from oftfx.ops.norm_rotate import NORM_ROTATE, served
from oftfx.ops.rotate import ROTATE
from oftfx.ops.rotate_group import ROTATE_GROUP
from oftfx.passes.effects import epochs
from oftfx.passes.pattern import (
    Capture,
    Cast,
    Match,
    OneOf,
    arguments,
    call,
    has_shape,
    is_block_rotation,
    match,
    value_of,
)


def _is_row(node: Any) -> bool:
    """Of one number for each row."""
    value = value_of(node)
    return (
        value is not None
        and value.is_floating_point()
        and value.dim() > 1
        and has_shape(node, (*value.shape[:-1], 1))
    )


def _is_column(node: Any) -> bool:
    """Of one number for each column."""
    value = value_of(node)
    return value is not None and value.is_floating_point() and value.dim() == 1


_X, _MEAN = Capture("x"), Capture("mean", _is_row)
_RSTD, _STD = Capture("rstd", _is_row), Capture("std", _is_row)
_WEIGHT, _BIAS = Capture("weight", _is_column), Capture("bias", _is_column)
_WHOLE = (Cast(_X), Capture("shape"), Capture("weight"))
_CENTRED = Cast(OneOf((call("sub", Cast(_X), Cast(_MEAN)), _X)))
_ROWS = OneOf((call("mul", _CENTRED, Cast(_RSTD)), call("div", _CENTRED, Cast(_STD))))
_COLUMNS = call("mul", Cast(_WEIGHT), Cast(_ROWS))
NORM = Cast(
    OneOf(
        (
            call("rms_norm", *_WHOLE, Capture("eps")),
            call("layer_norm", *_WHOLE, Capture("bias"), Capture("eps")),
            call("add", Cast(_COLUMNS), Cast(_BIAS)),
            _COLUMNS,
            _ROWS,
        )
    )
)
"""Norms as models write them."""


class _Statistics(NamedTuple):
    mean: fx.Node | None
    rstd: fx.Node


def fuse_norm(graph: fx.GraphModule) -> int:
    """Fuses the rotations of norms with them; returns how many such ops there are then."""
    epoch = epochs(graph.graph)
    fused = 0
    for node in epoch:
        if node.target is not ROTATE_GROUP and not is_block_rotation(node):
            continue
        found = match(NORM, node.args[0])
        if found is None or not _is_norm(found):
            continue
        # The op reads x where the rotation was, not where the norm was.
        if len({epoch[one] for one in (*found.nodes, node)}) > 1:
            continue
        if _served(node, found) and not _is_trained(found):
            _fuse(graph.graph, node, found)
            fused += 1
        else:
            counters["oftfx"]["norms_left"] += 1
    return fused


def _cores(rotation: fx.Node) -> list[fx.Node]:
    given: Any = rotation.args[1]
    return list(given) if rotation.target is ROTATE_GROUP else [given]


def _is_norm(found: Match) -> bool:
    """Whether what was captured goes together, along the last axis."""
    x = value_of(found["x"])
    if x is None or x.dim() == 0 or not x.is_floating_point():
        return False
    given: Mapping[str, Any] = found.captured
    vectors = [given[name] for name in ("weight", "bias") if given.get(name) is not None]
    if not all(_is_column(one) and has_shape(one, x.shape[-1:]) for one in vectors):
        return False
    rows = [given[name] for name in ("mean", "rstd", "std") if name in given]
    if not all(has_shape(one, (*x.shape[:-1], 1)) for one in rows):
        return False
    if rows:
        return True
    shape = given["shape"]  # where sizes are dynamic, `x.shape[-1:]` is a node as a whole
    sizes = shape.meta.get("example_value") if isinstance(shape, fx.Node) else shape
    return isinstance(sizes, Sequence) and len(sizes) == 1


def _served(rotation: fx.Node, found: Match, readers: int = 1) -> bool:
    """Whether one kernel does it all; without, the compiler's norm and a rotation are faster."""
    x, y = value_of(found["x"]), value_of(rotation.args[0])
    cores = [value_of(core) for core in _cores(rotation)]
    if x is None or y is None or any(core is None for core in cores):
        return False
    return served(x, cores * readers, y.dtype)  # type: ignore[arg-type]


def _is_trained(found: Match) -> bool:
    """Whether the norm itself is, whose gradients the compiler sums better than plain PyTorch."""
    values = (value_of(found.captured.get(name)) for name in ("weight", "bias"))
    return torch.is_grad_enabled() and any(
        value is not None and value.requires_grad for value in values
    )


def _fuse(graph: fx.Graph, rotation: fx.Node, found: Match) -> None:
    given, y = found.captured, value_of(rotation.args[0])
    assert y is not None
    with graph.inserting_before(rotation):
        mean, rstd = _statistics(graph, found)
        norm = (mean, rstd, given.get("weight"), given.get("bias"))
        readers = _readers(rotation, found)
        operands = (given["x"], _cores(rotation), y.dtype, len(readers), *norm)
        fused = graph.call_function(NORM_ROTATE, operands)
        for i, users in enumerate(readers if rotation.target is ROTATE else ()):
            out = graph.call_function(operator.getitem, (fused, i))
            out.meta = rotation.meta
            for user in users:
                user.replace_input_with(rotation, out)
    rotation.replace_all_uses_with(fused)
    graph.erase_node(rotation)
    for node in found.nodes:  # from the last one backwards
        if not node.users:
            graph.erase_node(node)


def _readers(rotation: fx.Node, found: Match) -> list[list[fx.Node]]:
    """The users of a rotation, each for itself where its gradient can stay so."""
    users, core = list(rotation.users), value_of(_cores(rotation)[0])
    trained = torch.is_grad_enabled() and core is not None and core.requires_grad
    if rotation.target is ROTATE and trained and _served(rotation, found, len(users)):
        return [[user] for user in users]
    return [users]


def _statistics(graph: fx.Graph, found: Match) -> _Statistics:
    """The mean and rstd of each row: the graph's own, or nodes for those of a whole norm."""
    given = found.captured
    if "rstd" in given:
        return _Statistics(given.get("mean"), given["rstd"])
    if "std" in given:
        return _Statistics(
            given.get("mean"), graph.call_function(torch.reciprocal, (given["std"],))
        )
    x, value = found["x"], value_of(found["x"])
    assert value is not None
    wide = torch.promote_types(value.dtype, torch.float32)
    eps = torch.finfo(wide).eps if found["eps"] is None else found["eps"]
    h, mean = graph.call_method("to", (x, wide)), None
    if any(arguments(node, "layer_norm") for node in found.nodes):
        options: dict[str, Any] = {"dim": -1, "correction": 0, "keepdim": True}
        both = graph.call_function(torch.var_mean, (h,), options)
        square, mean = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
    else:
        square = graph.call_method("mean", (graph.call_method("pow", (h, 2)), -1, True))
    return _Statistics(
        mean, graph.call_function(torch.rsqrt, (graph.call_function(operator.add, (square, eps)),))
    )
