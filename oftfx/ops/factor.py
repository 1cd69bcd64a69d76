"""A factor of a rotation: one of the ops that map x, with the operands it takes besides x."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oftfx.ops import rotate  # noqa: F401  (registers torch.ops.oftfx)


class Factor(NamedTuple):
    """``I + Pᵀ(T − I)P``, as the op that applies it: ``x·F = op(x, *operands)``.

    Attributes:
        op: One of [`MAPS`][oftfx.ops.factor.MAPS].
        operands: What it takes besides x: tensors, or the nodes of a graph that stand for them, and
            constants.
    """

    op: Any
    operands: tuple[Any, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """``x·F``, of x's shape and dtype."""
        result: Tensor = self.op(x, *self.operands)
        return result

    def transposed(self) -> "Factor":
        """``Fᵀ``, by which a weight's rows are multiplied when F is folded into it."""
        return Factor(self.op, MAPS[self.op].transpose(*self.operands))

    def defect(self) -> Tensor:
        """``‖FᵀF − I‖₂``, in float64."""
        return MAPS[self.op].defect(*self.operands)


class Map(NamedTuple):
    """What is known of an op that maps x, as functions of its operands.

    Attributes:
        transpose: The operands of the transpose.
        defect: ``‖FᵀF − I‖₂``.
    """

    transpose: Callable[..., tuple[Any, ...]]
    defect: Callable[..., Tensor]


def _block_defect(core: Tensor) -> Tensor:
    c = core.double()
    return torch.linalg.matrix_norm(c + c.mT + c.mT @ c, ord=2).max()


MAPS: dict[Any, Map] = {
    torch.ops.oftfx.rotate.default: Map(lambda core: (core.mT,), _block_defect),
}
"""Every op that maps x."""
