"""A product of reflections as one map of the directions they span.

Two reflections in a row, of unit vectors u and u + δ, are ``I + VᵀDV`` with the two rows
V = (u, δ) and

    D = [ −2‖δ‖²   2 − 2‖δ‖² ]        since ⟨u, u + δ⟩ = 1 − ‖δ‖²/2
        [   −2        −2     ]

so that an equal pair, δ = 0, is the identity to the last bit: nothing is taken from a number and
given back. A product of such pairs is again ``I + VᵀKV``: with S the blocks of VVᵀ above its block
diagonal, ``K = D + DSD + DSDSD + … = (I − DS)⁻¹D``, a triangular solve.
"""

import torch
from torch import Tensor


def compact(u: Tensor) -> tuple[Tensor, Tensor]:
    """The support V, ``(…, r, d)``, and the kernel K, ``(…, r, r)``, of reflections.

    Args:
        u: (…, r, d), one direction each, of any length but zero; an even number.
    """
    rows, rank = unit(u), u.shape[-2]
    first, second = rows[..., ::2, :], rows[..., 1::2, :]
    support = torch.stack((first, second - first), -2).flatten(-3, -2)
    gram = support @ support.mT
    pair = torch.arange(rank, device=rows.device) // 2
    apart = gram.diagonal(dim1=-2, dim2=-1)[..., 1::2]  # ‖δ‖² of every pair
    two = torch.full_like(apart, 2)
    blocks = torch.stack((-2 * apart, 2 - 2 * apart, -two, -two), -1).unflatten(-1, (2, 2))
    d = block_diagonal(blocks)
    above = gram * (pair[:, None] < pair)
    eye = torch.eye(rank, dtype=rows.dtype, device=rows.device)
    kernel = torch.linalg.solve_triangular(eye - d @ above, d, upper=True, unitriangular=True)
    return support, kernel.contiguous()


def unit(u: Tensor) -> Tensor:
    """The rows of U at length one, at least float32."""
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    return u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)


def block_diagonal(blocks: Tensor) -> Tensor:
    """(…, n, 2, 2) to (…, 2n, 2n)."""
    n = blocks.shape[-3]
    eye = torch.eye(n, dtype=blocks.dtype, device=blocks.device)
    return (blocks[..., :, :, None, :] * eye[:, None, :, None]).flatten(-4, -3).flatten(-2)
