"""The mathematics: pure functions of tensors, which know nothing of graphs or modules.

Every method is one product ``M = ∏ (I + Pᵀ(T − I)P)``; its file says which parameters a site has,
the cores made from them, and the factors made from the cores.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from oftfx.ops.factor import Factor
from oftfx.rotations import boft, goft, hra, loft, oft, psoft, qgoft
from oftfx.rotations.supports import Weight
from oftfx.spec import BOFT, COFT, GOFT, HRA, LOFT, OFT, PSOFT, QGOFT, Spec


class Method(Protocol):
    """What a method's file defines.

    ``tensors`` are a site's parameters by name. ``cores`` and ``health`` take any number of leading
    axes, over which sites of equal shapes are batched.

    Attributes:
        FIXED: Names of the tensors that are kept with a rotation but never trained.
    """

    FIXED: frozenset[str]

    def shapes(self, spec: Any, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of a site whose input has this width."""

    def misfit(self, spec: Any, width: int) -> str | None:
        """Why this spec cannot rotate an input of this width, and what would; None when it can."""

    def start(self, spec: Any, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Initial values of the trained parameters, on the CPU."""

    def cores(self, tensors: Mapping[str, Tensor], spec: Any) -> tuple[Tensor, ...]:
        """The tensors that the factors take, at least float32: all the work on parameters."""

    def factors(self, cores: Sequence[Any], spec: Any) -> tuple[Factor, ...]:
        """The factors of one site in the order x meets them; ``cores`` may be graph nodes."""

    def health(self, tensors: Mapping[str, Tensor], spec: Any) -> tuple[Tensor, Tensor]:
        """‖Q‖₂ and ‖MᵀM − I‖₂ of the worst factor of each site."""


class Anchored(Method, Protocol):
    """What the file of a method with FIXED tensors defines besides."""

    def fixed(
        self, spec: Any, width: int, generator: torch.Generator, weight: Weight
    ) -> dict[str, Tensor]:
        """Values of the FIXED tensors; ``weight`` is called only where they depend on W."""


_METHODS: dict[type[Spec], Method] = {
    OFT: oft,
    COFT: oft,
    BOFT: boft,
    GOFT: goft,
    QGOFT: qgoft,
    HRA: hra,
    PSOFT: psoft,
    LOFT: loft,
}
_PENALTIES: dict[type[Spec], Callable[[Mapping[str, Tensor], Any], Tensor]] = {
    QGOFT: qgoft.penalty,
    HRA: hra.penalty,
}
_PROJECTIONS: dict[type[Spec], Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]] = {
    COFT: oft.projected,
}


def method_of(spec: Spec) -> Method:
    """The mathematics of a spec."""
    return _METHODS[type(spec)]


def block_of(spec: Spec) -> int | None:
    """b, where a spec's rotations are one factor of (n, b, b) cores, one for each block."""
    if not isinstance(spec, OFT) or method_of(spec) is not oft or spec.share_blocks:
        return None
    return spec.block_size


def penalty_of(spec: Spec) -> Callable[[Mapping[str, Tensor], Any], Tensor] | None:
    """The regulariser of a spec, ``(tensors, spec)`` to one number a site; None without one."""
    return _PENALTIES.get(type(spec))


def projection_of(
    spec: Spec,
) -> Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]] | None:
    """What keeps a site's parameters where a spec wants them; None where they are free."""
    return _PROJECTIONS.get(type(spec))


def is_free(spec: Spec) -> bool:
    """Whether a spec's maps need be no rotations, so that none leads from the identity to them."""
    return isinstance(spec, QGOFT) or getattr(spec, "core", None) == "free"


def is_linear(spec: Spec) -> bool:
    """Whether a spec's parameters are the generators of its rotations: entries of Q, or angles."""
    return not (is_free(spec) or isinstance(spec, HRA))


def scaled(tensors: Mapping[str, Tensor], spec: Spec, scale: float) -> Mapping[str, Tensor]:
    """A site's parameters this far along its rotations, at least float32; themselves at 1.

    Those of Q, which turn the same planes by ``2·arctan(s·θ)``; GOFT's angles, HRA's between the
    directions of a pair; vectors and magnitudes, whose 0 is the identity too.
    """
    if scale == 1:
        return tensors
    if isinstance(spec, HRA):
        return hra.scaled(tensors, scale)
    kept = method_of(spec).FIXED
    return {name: t if name in kept else oft.wide(t) * scale for name, t in tensors.items()}


def fixed(spec: Spec, width: int, seed: int, weight: Weight) -> dict[str, Tensor]:
    """Values of the tensors that a rotation keeps but never trains, on any device."""
    method = method_of(spec)
    if not method.FIXED:
        return {}
    # Not the stream that the trained parameters start from.
    generator = torch.Generator().manual_seed(seed + 1)
    return cast("Anchored", method).fixed(spec, width, generator, weight)


def is_fixed(parameter: str) -> bool:
    """Whether a rotation's parameter of this name is kept but never trained."""
    leaf = parameter.rpartition(".")[2]
    return any(leaf in method.FIXED for method in _METHODS.values())


def output_shapes(spec: Spec, out: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what a site of this many outputs trains behind its matmul.

    It is the site's own, also where the rotation before the matmul is shared.
    """
    return {"magnitude": (out,)} if getattr(spec, "magnitude", False) else {}


def num_trainable(spec: Spec, width: int) -> int:
    """How many numbers a rotation of this width trains."""
    method = method_of(spec)
    shapes = method.shapes(spec, width)
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in method.FIXED)
