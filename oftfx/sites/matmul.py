"""The spellings of ``x·W`` as a graph node, before and after decomposition.

    linear(x, W, b)          matmul(x, Wᵀ)      addmm(b, x, Wᵀ)       mm(x, Wᵀ)

where Wᵀ may be any chain of `t`, `transpose`, `permute`, `.T`, `.mT`, casts and `detach` over a
parameter.
"""

import operator
from typing import Any, Literal, NamedTuple

import torch
from torch import fx

from oftfx.ops.factor import MAPS, SCALE
from oftfx.ops.int8_linear import INT8_LINEAR
from oftfx.sites import gemm_4bit

Layout = Literal["out_in", "in_out"]
"""How a weight is stored: (out, in) as `Linear` does, or (in, out)."""

aten = torch.ops.aten


class Operand(NamedTuple):
    """Where a target takes one of its operands."""

    position: int
    keyword: str

    def of(self, node: fx.Node) -> fx.Node | None:
        """The operand's node; None when it is no tensor of the graph."""
        given = node.args[self.position] if self.position < len(node.args) else None
        value = node.kwargs.get(self.keyword, given)
        return value if isinstance(value, fx.Node) else None

    def replace(self, node: fx.Node, value: fx.Node) -> None:
        """Puts another tensor in the operand's place."""
        if self.keyword in node.kwargs:
            node.update_kwarg(self.keyword, value)
        else:
            node.update_arg(self.position, value)


class Spelling(NamedTuple):
    """One target that multiplies by a weight: its operands, W's layout there, and what it adds."""

    x: Operand
    w: Operand
    out_in: bool
    bias: Operand | None = None


_LINEAR = Spelling(Operand(0, "input"), Operand(1, "weight"), True, Operand(2, "bias"))
_MATMUL = Spelling(Operand(0, "input"), Operand(1, "other"), out_in=False)
_MM = Spelling(Operand(0, "input"), Operand(1, "mat2"), out_in=False)
_ADDMM = Spelling(Operand(1, "mat1"), Operand(2, "mat2"), False, Operand(0, "input"))

_SPELLINGS: dict[Any, Spelling] = {
    torch.nn.functional.linear: _LINEAR,
    torch._C._nn.linear: _LINEAR,
    aten.linear.default: _LINEAR,
    torch.matmul: _MATMUL,
    operator.matmul: _MATMUL,
    aten.matmul.default: _MATMUL,
    "matmul": _MATMUL,
    "__matmul__": _MATMUL,
    torch.mm: _MM,
    aten.mm.default: _MM,
    "mm": _MM,
    torch.addmm: _ADDMM,
    aten.addmm.default: _ADDMM,
    "addmm": _ADDMM,
}

# Of libraries that may not be installed, by name. Their weights are packed, in shapes of their own.
_QUANTISED: dict[str, Spelling] = {
    gemm_4bit.NAME: Spelling(Operand(0, "A"), Operand(1, "B"), True, Operand(6, "bias")),
    str(INT8_LINEAR): Spelling(Operand(0, "x"), Operand(1, "rows"), True, Operand(4, "bias")),
}
_UNPACKING = gemm_4bit.UNPACKING  # before 0.50, a matmul reads what it gives
_SHAPES = {
    gemm_4bit.NAME: Operand(2, "shapeB"),
    _UNPACKING: Operand(4, "shape"),
    str(INT8_LINEAR): Operand(2, "shape"),
}

_SWAPS = {
    torch.t,
    torch.transpose,
    torch.permute,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.mT.default,
    aten.mH.default,
    aten.numpy_T.default,
    aten.adjoint.default,
    "t",
    "transpose",
    "permute",
}
_ATTRIBUTES = ("T", "mT", "H", "mH")
_CASTS = {
    *MAPS,  # another adapter's: the base is what is matched
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    torch.detach,
    torch.clone,
    "to",
    "type",
    "type_as",
    "float",
    "half",
    "bfloat16",
    "double",
    "contiguous",
    "detach",
    "clone",
}
_VIEWS = {
    *MAPS,
    torch.reshape,
    torch.flatten,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    "view",
    "reshape",
    "flatten",
    "expand",
}


def spelling(node: fx.Node) -> Spelling | None:
    """How this node writes a matmul; None for a node that is none."""
    if node.op not in ("call_function", "call_method"):
        return None
    return _SPELLINGS.get(node.target) or _QUANTISED.get(str(node.target))


def packed_operands(node: fx.Node) -> gemm_4bit.Operands | None:
    """What a 4-bit matmul takes, in one op or in two; None for other nodes."""
    if str(node.target) == gemm_4bit.NAME:
        return gemm_4bit.Operands(*node.args, **node.kwargs)  # type: ignore[arg-type]
    spelled = spelling(node)
    unpacked = None if spelled is None else spelled.w.of(node)
    while unpacked is not None and str(unpacked.target) != _UNPACKING:
        known = unpacked.target in _CASTS or unpacked.target in _SWAPS
        unpacked = unpacked.all_input_nodes[0] if known else None
    if spelled is None or unpacked is None:
        return None
    x, bias = spelled.x.of(node), None if spelled.bias is None else spelled.bias.of(node)
    return gemm_4bit.of_two(x, unpacked, bias)


def quantised_shape(node: fx.Node) -> tuple[int, int] | None:
    """The shape (out, in) of the weight that a node reads packed; None for others."""
    if node.op != "call_function" or (where := _SHAPES.get(str(node.target))) is None:
        return None
    out, width = node.kwargs.get(where.keyword, node.args[where.position])  # type: ignore[misc]
    return int(out), int(width)  # type: ignore[arg-type]


def packed_behind(node: fx.Node) -> fx.Node | None:
    """Where the packed weight that a node reads comes from; None for nodes that read none."""
    if quantised_shape(node) is None:
        return None
    spelled = spelling(node)
    packed = Operand(0, "A").of(node) if spelled is None else spelled.w.of(node)
    return None if packed is None else parameter_behind(packed)[0]


def parameter_behind(node: fx.Node) -> tuple[fx.Node, bool]:
    """Follows casts, transposes and unpacking down to where a weight comes from.

    Returns:
        The node they start at, and whether an odd number of transposes of W lies between.
    """
    swapped = packed = False
    while node.op in ("call_function", "call_method"):
        if not is_view_of_weight(node):
            break
        swapped ^= _transposes(node) and not packed
        packed |= str(node.target) == _UNPACKING
        node = node.all_input_nodes[0]
    return node, swapped


def tensor_behind(node: fx.Node) -> fx.Node:
    """Follows casts and views of an activation to the tensor they start from.

    Two inputs of one width over the same source hold the same rows, so they can share a rotation.
    """
    while node.op in ("call_function", "call_method") and (
        node.target in _CASTS or node.target in _VIEWS
    ):
        node = node.all_input_nodes[0]
    return node


def is_view_of_weight(node: fx.Node) -> bool:
    """Whether a node only casts, transposes, unpacks, rotates or scales its input."""
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    known = node.target in _CASTS or node.target in _SWAPS or node.target is SCALE
    return known or str(node.target) == _UNPACKING or _reshapes_packed(node)


def _reshapes_packed(node: fx.Node) -> bool:
    """Whether a node lays packed numbers out as a quantised matmul wants them."""
    return (
        node.target in _VIEWS
        and bool(node.users)
        and all(quantised_shape(user) or _reshapes_packed(user) for user in node.users)
    )


def _transposes(node: fx.Node) -> bool:
    """Whether a view of a 2-D tensor exchanges its axes."""
    if node.target is getattr:
        return True
    if node.target not in _SWAPS:
        return False
    dims: Any = (*node.args[1:], *node.kwargs.values())
    if len(dims) == 1 and isinstance(dims[0], (list, tuple)):
        dims = dims[0]
    if "permute" in str(node.target):
        return int(dims[0]) % 2 == 1
    return not dims or (int(dims[0]) - int(dims[1])) % 2 == 1
