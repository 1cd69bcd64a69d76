"""GOFT: one angle for each pair of coordinates in a tree, d − 1 in all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.factor import Factor
from oftfx.ops.givens import GIVENS, stages
from oftfx.rotations.oft import around_zero
from oftfx.spec import GOFT

FIXED: frozenset[str] = frozenset()


def shapes(spec: GOFT, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a site's parameters: ``(d − 1,)`` angles, and ``(d,)`` scales less one."""
    return {"theta": (width - 1,)} | scale_shape(spec, width)


def misfit(spec: GOFT, width: int) -> str | None:
    """Why this spec cannot rotate an input of this width; None when it can."""
    return None if width > 1 else "its input has one coordinate, and a rotation needs two"


def start(spec: GOFT, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The identity, or angles of the spec's standard deviation."""
    return {
        name: around_zero(spec, shape, generator) for name, shape in shapes(spec, width).items()
    }


def cores(tensors: Mapping[str, Tensor], spec: GOFT) -> tuple[Tensor]:
    """The residual blocks ``[[cos θ − 1, sin θ], [−sin θ, cos θ − 1]]``, ``(…, d − 1, 2, 2)``."""
    theta = tensors["theta"].to(torch.promote_types(tensors["theta"].dtype, torch.float32))
    diagonal = -2 * torch.sin(theta / 2).square()  # cos θ − 1 without its cancellation
    sine = torch.sin(theta)
    blocks = torch.stack((diagonal, sine, -sine, diagonal), -1).unflatten(-1, (2, 2))
    return (scaled(blocks, tensors),)


def factors(cores: Sequence[Any], spec: GOFT) -> tuple[Factor]:
    """All stages as one factor."""
    return (Factor(GIVENS, (cores[0],)),)


def health(tensors: Mapping[str, Tensor], spec: GOFT) -> tuple[Tensor, Tensor]:
    """``tan(θ/2)``, which is ‖Q‖₂ of a plane's rotation, and ``‖BᵀB − I‖₂`` of the worst block."""
    return block_health(*cores(tensors, spec))


def scale_shape(spec: GOFT, width: int) -> dict[str, tuple[int, ...]]:
    """Shape of the optional scales."""
    return {"scale": (width,)} if spec.scale else {}


def scaled(blocks: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Multiplies the optional scales ``diag(1 + s)`` on to the map, for nothing.

    Every coordinate is finished by the column of one block, which takes its scale in: the second
    column of its pair's, and for coordinate 0 the first of the last.
    """
    if "scale" not in tensors:
        return blocks
    scale = tensors["scale"].to(blocks.dtype)
    first = torch.zeros_like(scale[..., 1:])
    first = torch.cat((first[..., :-1], scale[..., :1]), -1)
    second = torch.cat([scale[..., step :: 2 * step] for step, _ in stages(scale.shape[-1])], -1)
    columns = torch.stack((first, second), -1)[..., None, :]
    eye = torch.eye(2, dtype=blocks.dtype, device=blocks.device)
    return blocks + (blocks + eye) * columns


def block_health(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """``tan(θ/2)`` of the rotation nearest to a block, and ``‖BᵀB − I‖₂``, the worst of each site.

    Args:
        blocks: (…, n, 2, 2), residual.
    """
    (a, b), (c, d) = ((row.unbind(-1)) for row in blocks.unbind(-2))
    angle = torch.atan2(b - c, 2 + a + d).abs()
    # BᵀB − I is a symmetric 2×2 matrix [[p, q], [q, r]], whose eigenvalues have a formula.
    p, r = 2 * a + a * a + c * c, 2 * d + b * b + d * d
    q = b + c + a * b + c * d
    error = ((p + r) / 2).abs() + torch.hypot((p - r) / 2, q)
    return torch.tan(angle / 2).amax(-1), error.amax(-1)
