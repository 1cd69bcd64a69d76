"""A factor of a rotation: one of the ops that map x, with the operands it takes besides x."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oftfx.ops import scale  # noqa: F401  (registers torch.ops.oftfx)
from oftfx.ops.define import call
from oftfx.ops.givens import GIVENS
from oftfx.ops.rotate import ROTATE
from oftfx.ops.subspace import SUBSPACE
from oftfx.rotations import cayley

AT_ONCE = 2**23
"""How many numbers are looked at together: a few tensors of 64 MiB in float64."""


class Factor(NamedTuple):
    """``I + Pᵀ(T − I)P``, as the op that applies it: ``x·F = op(x, *operands)``.

    Attributes:
        op: One of [`MAPS`][oftfx.ops.factor.MAPS], or [`SCALE`][oftfx.ops.factor.SCALE].
        operands: What it takes besides x: tensors, or the nodes of a graph that stand for them, and
            constants.
    """

    op: Any
    operands: tuple[Any, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """``x·F``, of x's shape and dtype."""
        result: Tensor = call(self.op, x, *self.operands)
        return result

    def transposed(self) -> "Factor":
        """``Fᵀ``, by which a weight's rows are multiplied when F is folded into it."""
        return Factor(self.op, MAPS[self.op].transpose(*self.operands))

    def defect(self) -> Tensor:
        """``‖FᵀF − I‖₂``, in float64; of stacked operands, of each."""
        return MAPS[self.op].defect(*self.operands)


def defects(factors: Sequence[Factor]) -> list[Tensor]:
    """[`defect`][oftfx.ops.factor.Factor.defect] of each of many factors, many alike at once."""
    alike: dict[Any, list[int]] = {}
    for i, factor in enumerate(factors):
        kinds = (
            (each.shape, each.dtype, each.device) if isinstance(each, Tensor) else each
            for each in factor.operands
        )
        alike.setdefault((factor.op, *kinds), []).append(i)
    found: dict[int, Tensor] = {}
    for members in alike.values():
        size = sum(
            each.numel() for each in factors[members[0]].operands if isinstance(each, Tensor)
        )
        step = max(1, AT_ONCE // size)
        for some in (members[i : i + step] for i in range(0, len(members), step)):
            columns = zip(*(factors[i].operands for i in some), strict=True)
            stacked = (torch.stack(c) if isinstance(c[0], Tensor) else c[0] for c in columns)
            values = Factor(factors[some[0]].op, tuple(stacked)).defect()
            found.update(zip(some, values.unbind(), strict=True))
    return [found[i] for i in range(len(factors))]


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
    # Squared as often as float64 can tell, and unlike a decomposition without a word to the host.
    return cayley.spectral_norm(c + c.mT + c.mT @ c, multiplicity=1, squarings=32).amax(-1)


def _subspace_defect(support: Tensor, kernel: Tensor) -> Tensor:
    """With ``G = PPᵀ``, ``FᵀF − I = Pᵀ(K + Kᵀ + KᵀGK)P``: no (d, d) matrix is needed.

    Its nonzero eigenvalues are those of ``√G (…) √G``, whether P's rows are orthonormal or not.
    """
    p, k = support.double(), kernel.double()
    gram = p @ p.mT
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(0).sqrt()[..., None, :]
    inner = k + k.mT + k.mT @ gram @ k
    return torch.linalg.matrix_norm(root.mT @ inner @ root, ord=2)


MAPS: dict[Any, Map] = {
    # The defect of its worst stage: a stage is a factor, whose blocks are these.
    GIVENS: Map(
        lambda core, transposed=False: (core, not transposed),
        lambda core, transposed=False: _block_defect(core),
    ),
    ROTATE: Map(
        lambda core, stride=1: (core.mT, stride), lambda core, stride=1: _block_defect(core)
    ),
    SUBSPACE: Map(lambda support, kernel: (support, kernel.mT), _subspace_defect),
}
"""Every op that maps x."""

SCALE = torch.ops.oftfx.scale.default
"""The op that maps what a matmul gives: ``I + diag(m)``, a factor on the output's side."""
