"""Supports: orthonormal directions of a layer's input, (r, d), within which a rotation turns it.

All work is products of W with tall thin matrices: nothing has more than 3(r + 8) columns.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from oftfx.errors import OftfxWarning

Weight = Callable[[], Tensor]
"""Reads the (out, d) weight that a rotation stands before, float32 or float64."""

OVERSAMPLING = 8
"""Columns beyond the rank that a randomised factorisation works with."""

ITERATIONS = 4
"""Subspace iterations, each with W and with Wᵀ."""

STEPS, ROUNDINGS = 300, 64
"""How long the exact decomposition goes on, and how many roundings of W it may be off."""


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
    """As [`principal`][oftfx.rotations.supports.principal], as exactly as W's dtype tells.

    By the locally optimal block preconditioned conjugate gradient method (LOBPCG, Knyazev 2001) on
    WᵀW, without a preconditioner: every step takes the best directions among the last ones, their
    residuals and the last step, until every residual ``‖Wᵀu − σv‖`` is a rounding of W.

    Warns:
        OftfxWarning: It is not after many steps.
    """
    width = weight.shape[1]
    columns = min(width, rank + OVERSAMPLING)
    if min(weight.shape) <= 3 * columns:  # then the whole decomposition is as small
        _, _, rows = torch.linalg.svd(weight, full_matrices=False)
        if len(rows) >= rank:
            return rows[:rank].contiguous()
        return orthonormal(rows.mT, rank, generator).mT.contiguous()

    basis = found = directions(width, columns, generator, like=weight)
    enough = ROUNDINGS * torch.finfo(weight.dtype).eps
    for _ in range(STEPS):
        left, values, rows = torch.linalg.svd(weight @ basis, full_matrices=False)
        left, values, last = left[:, :columns], values[:columns], found
        found = (basis @ rows.mT)[:, :columns]
        residual = weight.mT @ left - found * values
        worst = torch.linalg.vector_norm(residual[:, :rank], dim=0).max()
        if worst <= enough * values[0]:
            break
        tried = torch.cat([found, residual, found - last @ (last.mT @ found)], 1)
        # At length one, or the directions of small residuals would be lost among the others.
        basis = basis_of(torch.nn.functional.normalize(tried, dim=0))
    else:
        warnings.warn(
            f"svd='full': after {STEPS} steps the singular vectors have a residual of "
            f"{float(worst / values[0]):.0e}, not of {enough:.0e}. They span nearly as much.",
            OftfxWarning,
            stacklevel=2,
        )
    return found[:, :rank].mT.contiguous()


def random(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """Directions of a uniformly random subspace, (r, d), float64, on the CPU."""
    return directions(
        width, rank, generator, torch.empty(0, dtype=torch.float64, device="cpu")
    ).mT.contiguous()


def coordinate(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """Distinct random coordinates, (r, d), float64, on the CPU."""
    support = torch.zeros(rank, width, dtype=torch.float64, device="cpu")
    support[
        torch.arange(rank, device="cpu"),
        torch.randperm(width, generator=generator, device="cpu")[:rank],
    ] = 1
    return support


def directions(width: int, count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Orthonormal columns that span a uniformly random subspace, (d, count)."""
    values = torch.randn(width, count, generator=generator, dtype=torch.float64, device="cpu")
    return basis_of(values.to(like))


def basis_of(columns: Tensor) -> Tensor:
    """Orthonormal columns with the span of these; Householder's QR gives them always."""
    return torch.linalg.qr(columns).Q


def orthonormal(columns: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """An orthonormal basis of the columns' span, completed to ``count`` by random directions."""
    if (missing := min(count, columns.shape[0]) - columns.shape[1]) > 0:
        size = (columns.shape[0], missing)
        more = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
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
