"""Supports: orthonormal directions of a layer's input, (r, d), within which a rotation turns it.

All work on matrices of at most W's own size, by products with tall thin ones; none is d×d unless
W is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Weight = Callable[[], Tensor]
"""Reads the (out, d) weight that a rotation stands before, float32 or float64."""

OVERSAMPLING = 8
"""Columns beyond the rank that a randomised factorisation works with."""

ITERATIONS = 4
"""Subspace iterations, each with W and with Wᵀ."""


def principal(weight: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The top right singular vectors of W, by randomised subspace iteration.

    Args:
        weight: (out, d), float32 or float64.
        rank: r ≤ d. Beyond W's own rank the directions are arbitrary.
        generator: On the CPU: the same directions to begin with on every device.

    Returns:
        (r, d), orthonormal rows by falling singular value, in W's dtype and on its device.
    """
    width = weight.shape[1]
    basis = directions(width, min(width, rank + OVERSAMPLING), generator, like=weight)
    for _ in range(ITERATIONS):
        # Orthonormalised in between, or the small singular values' directions would be lost.
        basis = orthonormal(weight.mT @ basis_of(weight @ basis), basis.shape[1], generator)
    return ritz(weight @ basis, basis)[1][:, :rank].mT.contiguous()


def principal_exact(weight: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """As [`principal`][oftfx.rotations.supports.principal], from W's full decomposition."""
    _, _, rows = torch.linalg.svd(weight, full_matrices=False)
    if len(rows) >= rank:
        return rows[:rank].contiguous()
    return orthonormal(rows.mT, rank, generator).mT.contiguous()


def random(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """Directions of a uniformly random subspace, (r, d), float64, on the CPU."""
    return directions(width, rank, generator, torch.empty(0, dtype=torch.float64)).mT.contiguous()


def coordinate(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """Distinct random coordinates, (r, d), float64, on the CPU."""
    support = torch.zeros(rank, width, dtype=torch.float64)
    support[torch.arange(rank), torch.randperm(width, generator=generator)[:rank]] = 1
    return support


def directions(width: int, count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Orthonormal columns that span a uniformly random subspace, (d, count)."""
    values = torch.randn(width, count, generator=generator, dtype=torch.float64)
    return basis_of(values.to(like))


def basis_of(columns: Tensor) -> Tensor:
    """Orthonormal columns with the span of these; Householder's QR gives them always."""
    return torch.linalg.qr(columns).Q


def orthonormal(columns: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """An orthonormal basis of the columns' span, completed to ``count`` by random directions."""
    if (missing := min(count, columns.shape[0]) - columns.shape[1]) > 0:
        size = (columns.shape[0], missing)
        more = torch.randn(size, generator=generator, dtype=torch.float64)
        # As long as the given ones, next to which they would be noise or make noise of them.
        columns = torch.cat([basis_of(columns), more.to(columns) / size[0] ** 0.5], 1)
    return basis_of(columns)


def ritz(image: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors of a matrix within a subspace.

    Args:
        image: (n, l), the matrix times the basis.
        basis: (d, l), orthonormal columns.

    Returns:
        (min(n, l),) falling singular values, and (d, l) the basis turned to singular vectors.
    """
    small = torch.linalg.qr(image, mode="r").R
    _, values, rows = torch.linalg.svd(small, full_matrices=True)
    return values, basis @ rows.mT
