"""HRA: a product of learned reflections, as one map of the directions they span."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.factor import Factor
from oftfx.ops.subspace import SUBSPACE
from oftfx.rotations import householder
from oftfx.rotations.cayley import dominant
from oftfx.spec import HRA

FIXED: frozenset[str] = frozenset()


def shapes(spec: HRA, width: int) -> dict[str, tuple[int, ...]]:
    """Shape of a site's parameters: ``(rank, width)``, of any length but zero."""
    return {"u": (spec.rank, width)}


def misfit(spec: HRA, width: int) -> str | None:
    """Why this spec cannot rotate an input of this width, and what would; None when it can."""
    if spec.rank <= width:
        return None
    return f"rank={spec.rank} is more than its input width {width} (at most {width // 2 * 2})"


def start(spec: HRA, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random directions in equal pairs, which cancel; ``init_std`` sets the pairs apart."""
    pairs = torch.randn(
        spec.rank // 2, width, generator=generator, dtype=torch.float64, device="cpu"
    )
    u = pairs.repeat_interleave(2, 0) / width**0.5
    if spec.init_std:
        apart = torch.randn(u.shape, generator=generator, dtype=torch.float64, device="cpu")
        u = u + apart * spec.init_std / width**0.5
    return {"u": u}


def cores(tensors: Mapping[str, Tensor], spec: HRA) -> tuple[Tensor, Tensor]:
    """The support V, ``(…, r, d)``, and the kernel K, ``(…, r, r)``."""
    support, kernel = torch.ops.oftfx.reflections.default(tensors["u"])
    return support, kernel


def factors(cores: Sequence[Any], spec: HRA) -> tuple[Factor]:
    """All reflections as one factor."""
    return (Factor(SUBSPACE, tuple(cores)),)


def health(tensors: Mapping[str, Tensor], spec: HRA) -> tuple[Tensor, Tensor]:
    """``tan(θ/2)`` of the largest angle θ, and no error: reflections are orthogonal.

    ``‖M − I‖₂ = 2 sin(θ/2)`` is that of ``VᵀKV``, whose squared singular values are the
    eigenvalues of ``KᵀGKG``; as a rotation's they come in pairs.
    """
    support, kernel = cores(tensors, spec)
    gram = support @ support.mT
    sine = (dominant(kernel.mT @ gram @ kernel @ gram).sqrt() / 2).clamp_max(1)
    return sine / (1 - sine.square()).sqrt(), torch.zeros_like(sine)


def scaled(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Directions whose reflections turn the plane of each pair by this much of what they do.

    Two reflections turn by twice the angle φ between their directions, and so do those of the
    directions between them, at ``s·φ``. Either sign of a direction is the same reflection; the
    nearer one is taken.
    """
    rows = householder.unit(tensors["u"])
    first, second = rows[..., ::2, :], rows[..., 1::2, :]
    second = torch.where((first * second).sum(-1, keepdim=True) < 0, -second, second)
    apart = second - first  # exactly zero for an equal pair, which stays one
    along = (first * apart).sum(-1, keepdim=True)  # cos φ − 1
    across = apart - along * first
    sine = torch.linalg.vector_norm(across, dim=-1, keepdim=True)
    angle = scale * torch.atan2(sine, 1 + along)
    ratio = torch.where(sine > 0, torch.sin(angle) / sine.where(sine > 0, 1), scale)
    between = torch.cos(angle) * first + ratio * across
    return {"u": torch.stack((first, between), -2).flatten(-3, -2)}


def penalty(tensors: Mapping[str, Tensor], spec: HRA) -> Tensor:
    """``λ‖I − UUᵀ‖_F²`` of each site's unit rows, ``(…)``."""
    unit = householder.unit(tensors["u"])
    eye = torch.eye(unit.shape[-2], dtype=unit.dtype, device=unit.device)
    return spec.weight * (eye - unit @ unit.mT).square().sum((-2, -1))
