"""HRA: a product of learned reflections, as one map of the directions they span.

Two reflections in a row, of unit vectors u and u + δ, are ``I + VᵀDV`` with the two rows
V = (u, δ) and

    D = [ −2‖δ‖²   2 − 2‖δ‖² ]        since ⟨u, u + δ⟩ = 1 − ‖δ‖²/2
        [   −2        −2     ]

so that an equal pair, δ = 0, is the identity to the last bit: nothing is taken from a number and
given back. A product of such pairs is again ``I + VᵀKV``: with S the blocks of VVᵀ above its block
diagonal, ``K = D + DSD + DSDSD + … = (I − DS)⁻¹D``, a triangular solve.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.factor import Factor
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
    pairs = torch.randn(spec.rank // 2, width, generator=generator, dtype=torch.float64)
    u = pairs.repeat_interleave(2, 0) / width**0.5
    if spec.init_std:
        apart = torch.randn(u.shape, generator=generator, dtype=torch.float64)
        u = u + apart * spec.init_std / width**0.5
    return {"u": u}


def cores(tensors: Mapping[str, Tensor], spec: HRA) -> tuple[Tensor, Tensor]:
    """The support V, ``(…, r, d)``, and the kernel K, ``(…, r, r)``."""
    unit = _unit(tensors)
    first, second = unit[..., ::2, :], unit[..., 1::2, :]
    support = torch.stack((first, second - first), -2).flatten(-3, -2)
    gram = support @ support.mT
    pair = torch.arange(spec.rank, device=unit.device) // 2
    apart = gram.diagonal(dim1=-2, dim2=-1)[..., 1::2]  # ‖δ‖² of every pair
    two = torch.full_like(apart, 2)
    blocks = torch.stack((-2 * apart, 2 - 2 * apart, -two, -two), -1).unflatten(-1, (2, 2))
    d = _block_diagonal(blocks)
    above = gram * (pair[:, None] < pair)
    eye = torch.eye(spec.rank, dtype=unit.dtype, device=unit.device)
    kernel = torch.linalg.solve_triangular(eye - d @ above, d, upper=True, unitriangular=True)
    return support, kernel.contiguous()


def factors(cores: Sequence[Any], spec: HRA) -> tuple[Factor]:
    """All reflections as one factor."""
    return (Factor(torch.ops.oftfx.subspace.default, tuple(cores)),)


def health(tensors: Mapping[str, Tensor], spec: HRA) -> tuple[Tensor, Tensor]:
    """``tan(θ/2)`` of the largest angle θ, and no error: reflections are orthogonal.

    ``‖M − I‖₂ = 2 sin(θ/2)`` is that of ``VᵀKV``, whose squared singular values are the
    eigenvalues of ``KᵀGKG``; as a rotation's they come in pairs.
    """
    support, kernel = cores(tensors, spec)
    gram = support @ support.mT
    sine = (dominant(kernel.mT @ gram @ kernel @ gram).sqrt() / 2).clamp_max(1)
    return sine / (1 - sine.square()).sqrt(), torch.zeros_like(sine)


def penalty(tensors: Mapping[str, Tensor], spec: HRA) -> Tensor:
    """``λ‖I − UUᵀ‖_F²`` of each site's unit rows, ``(…)``."""
    unit = _unit(tensors)
    eye = torch.eye(unit.shape[-2], dtype=unit.dtype, device=unit.device)
    return spec.weight * (eye - unit @ unit.mT).square().sum((-2, -1))


def _unit(tensors: Mapping[str, Tensor]) -> Tensor:
    """The rows of U at length one, at least float32."""
    u = tensors["u"].to(torch.promote_types(tensors["u"].dtype, torch.float32))
    return u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)


def _block_diagonal(blocks: Tensor) -> Tensor:
    """(…, n, 2, 2) to (…, 2n, 2n)."""
    n = blocks.shape[-3]
    eye = torch.eye(n, dtype=blocks.dtype, device=blocks.device)
    return (blocks[..., :, :, None, :] * eye[:, None, :, None]).flatten(-4, -3).flatten(-2)
