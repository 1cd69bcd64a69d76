"""Finds an expression in a torch-level graph, however the model's author spelt it.

    gate, up = Capture("gate"), Capture("up")
    swiglu = call("mul", call("silu", gate), up)

    found = match(swiglu, node)      # up * F.silu(gate), torch.mul(nn.functional.silu(gate), up), …
    found["gate"], found.nodes       # the captured node; the nodes the expression is made of

Arguments are compared after defaults are filled in, commuted operands in either order, and casts
are seen through where the pattern says [`Cast`][oftfx.passes.pattern.Cast].
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from oftfx.ops.rotate import ROTATE

_NONE: Mapping[str, Any] = MappingProxyType({})


class Operation(NamedTuple):
    """One operation.

    Attributes:
        targets: Its spellings: functions, and names of methods.
        parameters: The names of its parameters, in order.
        defaults: What parameters are where they are not given.
        commutes: Whether its first two operands may change places.
    """

    targets: tuple[Any, ...]
    parameters: tuple[str, ...]
    defaults: Mapping[str, Any] = _NONE
    commutes: bool = False


_TWO = ("input", "other")
_ALPHA = {"alpha": 1}
OPERATIONS: dict[str, Operation] = {
    "add": Operation((operator.add, torch.add, "add", "__add__"), (*_TWO, "alpha"), _ALPHA, True),
    "sub": Operation((operator.sub, torch.sub, "sub", "__sub__"), (*_TWO, "alpha"), _ALPHA),
    "div": Operation(
        (operator.truediv, torch.div, torch.true_divide, "div", "__truediv__"),
        (*_TWO, "rounding_mode"),
        {"rounding_mode": None},
    ),
    "mul": Operation(
        (operator.mul, torch.mul, torch.multiply, "mul", "__mul__"), _TWO, _NONE, True
    ),
    "pow": Operation((operator.pow, torch.pow, "pow", "__pow__"), ("input", "exponent")),
    "square": Operation((torch.square, "square"), ("input",)),
    "tanh": Operation((torch.tanh, "tanh"), ("input",)),
    "silu": Operation((F.silu,), ("input", "inplace"), {"inplace": False}),
    "relu": Operation((F.relu, torch.relu, "relu"), ("input", "inplace"), {"inplace": False}),
    "gelu": Operation(
        (F.gelu, torch._C._nn.gelu), ("input", "approximate"), {"approximate": "none"}
    ),
    "linear": Operation((F.linear,), ("input", "weight", "bias"), {"bias": None}),
    "rms_norm": Operation(
        (F.rms_norm, torch.rms_norm),
        ("input", "normalized_shape", "weight", "eps"),
        {"weight": None, "eps": None},
    ),
    "layer_norm": Operation(
        (F.layer_norm,),
        ("input", "normalized_shape", "weight", "bias", "eps"),
        {"weight": None, "bias": None, "eps": 1e-5},
    ),
}

_NAMED = {target: name for name, op in OPERATIONS.items() for target in op.targets}
_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16"}


class Capture(NamedTuple):
    """Whatever stands here, kept under a name; twice the same name is twice the same thing.

    Attributes:
        name: The name.
        where: What must hold for it.
    """

    name: str
    where: Callable[[Any], bool] = lambda _: True


class Call(NamedTuple):
    """An operation on operands: patterns, or constants that must be equal."""

    name: str
    operands: tuple[Any, ...]


class Cast(NamedTuple):
    """The inner pattern beneath casts between floating dtypes, as many as there are."""

    inner: Any


class OneOf(NamedTuple):
    """The first of several patterns that matches."""

    patterns: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Match:
    """What matched.

    Attributes:
        captured: Nodes and constants by the names of their captures.
        nodes: The nodes of the expression itself, without what it captured.
    """

    captured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()

    def __getitem__(self, name: str) -> Any:
        """What a capture holds."""
        return self.captured[name]

    def plus(self, node: fx.Node) -> "Match":
        """With one more node."""
        return dataclasses.replace(self, nodes=(*self.nodes, node))


def call(name: str, *operands: Any) -> Call:
    """A pattern of one of the [`OPERATIONS`][oftfx.passes.pattern]; defaults may be left out."""
    assert name in OPERATIONS, name
    return Call(name, operands)


def match(pattern: Any, node: Any) -> Match | None:
    """Matches a pattern that ends in this node; None where it does not."""
    return next(_matches(pattern, node, Match()), None)


def value_of(node: Any) -> Tensor | None:
    """The fake tensor that Dynamo saw a node give; None for what is no tensor."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def parameter(node: fx.Node) -> Tensor | None:
    """The tensor that a graph reads as an input; None for what it computes."""
    return plain(node) if node.op in ("placeholder", "get_attr") else None


def plain(node: fx.Node) -> Tensor | None:
    """The fake of a tensor that is what it seems: not sharded, quantised or under a transform."""
    value = value_of(node)
    return value if type(value) is FakeTensor else None


def matrix_and_bias(weight: fx.Node, bias: fx.Node | None) -> list[Tensor] | None:
    """The fakes of what a layer holds, a matrix and a number for each output; None for others.

    PyTorch's linear also takes biases of other shapes, which it broadcasts, and kernels do not.
    """
    matrix = parameter(weight)
    if matrix is None or matrix.dim() != 2:
        return None
    if bias is None:
        return [matrix]
    added = parameter(bias)
    return None if added is None or not has_shape(bias, matrix.shape[:1]) else [matrix, added]


def is_block_rotation(node: fx.Node) -> bool:
    """Whether a node turns blocks of neighbouring coordinates."""
    return node.target is ROTATE and node.args[2:] in ((), (1,))


def has_shape(node: Any, shape: Sequence[Any]) -> bool:
    """Whether it has for sure: no guard comes from here."""
    value = value_of(node)
    return (
        value is not None
        and value.dim() == len(shape)
        and all(statically_known_true(i == j) for i, j in zip(value.shape, shape, strict=True))
    )


def arguments(node: fx.Node, name: str) -> tuple[Any, ...] | None:
    """All arguments of a node, in order and with defaults; None if it is another operation."""
    if node.op not in ("call_function", "call_method") or _NAMED.get(node.target) != name:
        return None
    _, parameters, defaults, _ = OPERATIONS[name]
    given = {**defaults, **dict(zip(parameters, node.args, strict=False)), **node.kwargs}
    if len(node.args) > len(parameters) or given.keys() != set(parameters):
        return None
    return tuple(given[parameter] for parameter in parameters)


def _matches(pattern: Any, given: Any, found: Match) -> Iterator[Match]:
    match pattern:
        case Capture(name, where):
            if name not in found.captured:
                if where(given):
                    yield dataclasses.replace(found, captured={**found.captured, name: given})
            elif found.captured[name] is given:
                yield found
        case Cast(inner):
            if isinstance(given, fx.Node) and _is_cast(given):  # what is beneath them all first
                yield from _matches(pattern, given.args[0], found.plus(given))
            yield from _matches(inner, given, found)
        case OneOf(patterns):
            for one in patterns:
                yield from _matches(one, given, found)
        case Call(name, operands):
            if not isinstance(given, fx.Node) or (values := arguments(given, name)) is None:
                return
            _, parameters, defaults, commutes = OPERATIONS[name]
            rest = tuple(defaults.get(parameter) for parameter in parameters[len(operands) :])
            yield from _all((*operands, *rest), values, found.plus(given))
            if commutes:
                first, second, *others = operands
                yield from _all((second, first, *others, *rest), values, found.plus(given))
        case _:
            if not isinstance(given, fx.Node) and given == pattern:
                yield found


def _all(patterns: tuple[Any, ...], values: tuple[Any, ...], found: Match) -> Iterator[Match]:
    if not patterns:
        yield found
        return
    for partial in _matches(patterns[0], values[0], found):
        yield from _all(patterns[1:], values[1:], partial)


def _is_cast(node: fx.Node) -> bool:
    """Whether a node changes the dtype alone, and between dtypes of which neither is coarse."""
    if node.op != "call_method" or node.target not in _CASTS:
        return False
    after, before = value_of(node), value_of(node.args[0])
    if after is None or before is None or after.device != before.device:
        return False
    return all(v.is_floating_point() and v.dtype.itemsize > 1 for v in (after, before))
