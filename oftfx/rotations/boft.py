"""BOFT: a product of block-diagonal rotations over ever more distant coordinates.

    coordinates, in runs of b/2      0 1 2 3 4 5 6 7
    blocks of F_0 (stride 1)        (0 1)(2 3)(4 5)(6 7)
    blocks of F_1 (stride 2)        (0 2)(1 3)(4 6)(5 7)
    blocks of F_2 (stride 4)        (0 4)(1 5)(2 6)(3 7)

The number of coordinates that one reads doubles with every factor; the product of m is dense when
``2^m`` runs are all there are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.factor import Factor
from oftfx.ops.rotate import ROTATE
from oftfx.rotations import oft
from oftfx.spec import BOFT

FIXED: frozenset[str] = frozenset()


def shapes(spec: BOFT, width: int) -> dict[str, tuple[int, ...]]:
    """Shape of a site's parameters: one axis of factors before OFT's."""
    return {"theta": (spec.factors, *oft.shapes(spec, width)["theta"])}


def misfit(spec: BOFT, width: int) -> str | None:
    """Why this spec cannot rotate an input of this width, and what would; None when it can."""
    b, m = spec.block_size, spec.factors
    if why := oft.misfit(spec, width):
        return why
    if width % (2 ** (m - 1) * b) == 0:
        return None
    blocks = width // b
    most = (blocks & -blocks).bit_length()  # one more than the twos in the number of blocks
    return (
        f"factors={m} needs blocks in multiples of {2 ** (m - 1)}, and a block_size of {b} makes "
        f"{blocks} of its input width {width} (at most factors={most})"
    )


def start(spec: BOFT, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The identity, or skew entries of the spec's standard deviation."""
    return {"theta": oft.around_zero(spec, shapes(spec, width)["theta"], generator)}


def cores(tensors: Mapping[str, Tensor], spec: BOFT) -> tuple[Tensor, ...]:
    """The residual blocks of every factor, ``F_0`` first, each ``(…, n, b, b)``."""
    core = oft.blocks(tensors["theta"], spec)
    return tuple(core.select(-4, level) for level in range(spec.factors))


def factors(cores: Sequence[Any], spec: BOFT) -> tuple[Factor, ...]:
    """``F_{m−1} … F_0``, the farthest coordinates first."""
    strided = [Factor(ROTATE, (core, 2**level)) for level, core in enumerate(cores)]
    return tuple(reversed(strided))


def health(tensors: Mapping[str, Tensor], spec: BOFT) -> tuple[Tensor, Tensor]:
    """‖Q‖₂ and, by the error law, ‖RᵀR − I‖₂ of the worst block of all factors."""
    norms, errors = oft.health(tensors, spec)
    return norms.amax(-1), errors.amax(-1)
