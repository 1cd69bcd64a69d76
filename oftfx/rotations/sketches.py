"""Sketches: the top directions of a large matrix that is a sum over everything that streams by.

With x the rows that a matmul reads, dx and dy the loss's gradients there, and G = Σ dyᵀx the
gradient of its weight W:

    Skew         S = ½(WᵀG − GᵀW) = ½ Σ (dxᵀx − xᵀdx)      its top singular planes
    Gradient     G                                         its top right singular vectors

No such matrix is ever made. A sketch keeps a few columns V and adds up SV (or GV, then GᵀU), and
every pass over the same rows is one subspace iteration.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from oftfx.rotations import supports

PASSES = 3
PROBES = 8
"""Random directions outside the basis, by which what it misses is estimated."""


class Spectrum(NamedTuple):
    """What a sketch found.

    Attributes:
        support: (rank, d) orthonormal directions, the strongest first.
        energies: (rank,) the squared singular value of each, float64, on the CPU.
        total: The sum over all directions, estimated.
    """

    support: Tensor
    energies: Tensor
    total: float


class Sketch(ABC):
    """The image of a few columns under the matrix.

    Args:
        width: d.
        rank: How many directions are wanted.
        seed: Seeds the columns to begin with.
        like: Gives the device, and the dtype of all work.

    Attributes:
        basis: (d, l) orthonormal columns, by which the top directions are found.
        read: (d, l + probes), the basis and, in the last pass, random directions outside it.
        NEEDS_OUTPUT: Whether it takes the gradients of the matmul's output, or of its input.
    """

    NEEDS_OUTPUT: bool

    def __init__(self, width: int, rank: int, seed: int, like: Tensor) -> None:
        self.rank = rank
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.columns = min(width, rank + supports.OVERSAMPLING)
        self.basis = supports.directions(width, self.columns, self.generator, like)
        self.read = self.basis

    def probe(self) -> None:
        """Adds the random directions outside the basis."""
        width = len(self.basis)
        probes = min(PROBES, width - self.columns)
        more = torch.randn(
            width, probes, generator=self.generator, dtype=torch.float64, device="cpu"
        )
        outside = more.to(self.basis)
        for _ in range(2):  # once more for what rounding left
            outside = outside - self.basis @ (self.basis.mT @ outside)
        self.read = torch.cat([self.basis, supports.basis_of(outside)], 1)
        self.basis = self.read[:, : self.columns]  # one copy is enough

    def total(self, image: Tensor) -> float:
        """‖·‖_F² of the matrix: what the basis sees, and of the rest what the probes see of it."""
        inside, outside = image[:, : self.columns], image[:, self.columns :]
        total = float(inside.double().square().sum())
        if outside.shape[1]:
            rest = float(outside.double().square().sum())
            total += rest * (len(self.basis) - self.columns) / outside.shape[1]
        return total

    @abstractmethod
    def begin(self, number: int) -> None:
        """Makes ready for a pass."""

    @abstractmethod
    def add(self, reader: str, x: Tensor, grad: Tensor) -> None:
        """Adds what a matmul's rows x, (n, d), and their gradients contribute."""

    @abstractmethod
    def add_weight(self, reader: str, weight: Tensor, grad: Tensor) -> None:
        """Adds what a whole weight and its gradient contribute, both (out, d)."""

    @abstractmethod
    def images(self) -> list[Tensor]:
        """What has been added up in this pass."""

    @abstractmethod
    def result(self) -> Spectrum:
        """What was found, after the last pass."""


class Skew(Sketch):
    """``S = ½ Σ (dxᵀx − xᵀdx)``."""

    NEEDS_OUTPUT = False  # dx has passed through W, which so need not be known

    image: Tensor

    def begin(self, number: int) -> None:
        """Turns the basis to the last pass's image."""
        if number:
            self.basis = self.read = supports.orthonormal(self.image, self.columns, self.generator)
        if number == PASSES - 1:
            self.probe()
        self.image = torch.zeros_like(self.read)

    def add(self, reader: str, x: Tensor, grad: Tensor) -> None:
        """Adds what x and dx contribute."""
        self.image.addmm_(grad.mT, x @ self.read, alpha=0.5)
        self.image.addmm_(x.mT, grad @ self.read, alpha=-0.5)

    def add_weight(self, reader: str, weight: Tensor, grad: Tensor) -> None:
        """Adds what W and G contribute: S = ½(WᵀG − GᵀW)."""
        self.add(reader, grad, weight)

    def images(self) -> list[Tensor]:
        """SV."""
        return [self.image]

    def result(self) -> Spectrum:
        """The top left singular vectors of SV: of S, one iteration further than V."""
        columns, values, _ = torch.linalg.svd(self.image[:, : self.columns], full_matrices=False)
        support = columns[:, : self.rank].mT.contiguous()
        return Spectrum(support, _squares(values, self.rank), self.total(self.image))


class Gradient(Sketch):
    """``G = Σ dyᵀx``, stacked over the matmuls that read x; GV and GᵀU by turns.

    Args:
        width: d.
        rank: How many directions are wanted.
        seed: Seeds the columns to begin with.
        like: Gives the device, and the dtype of all work.
        outs: The readers and how many rows of G are theirs.
    """

    NEEDS_OUTPUT = True

    def __init__(
        self, width: int, rank: int, seed: int, like: Tensor, outs: Mapping[str, int]
    ) -> None:
        super().__init__(width, rank, seed, like)
        self.outs = outs
        self.across: dict[str, Tensor] = {}  # (out, ·) per reader: GV, or U
        self.image: Tensor | None = None  # (d, ·): GᵀU

    def begin(self, number: int) -> None:
        """Makes ready for GV in even passes and for GᵀU in odd ones."""
        if number % 2:
            stacked = supports.basis_of(torch.cat(list(self.across.values())))
            parts = stacked.split(list(self.outs.values()))
            self.across = dict(zip(self.outs, parts, strict=True))
            self.image = self.basis.new_zeros(len(self.basis), stacked.shape[1])
            return
        if self.image is not None:
            self.basis = supports.orthonormal(self.image, self.columns, self.generator)
            self.image, self.read = None, self.basis
        if number == PASSES - 1:
            self.probe()
        empty = {reader: (out, self.read.shape[1]) for reader, out in self.outs.items()}
        self.across = {reader: self.read.new_zeros(shape) for reader, shape in empty.items()}

    def add(self, reader: str, x: Tensor, grad: Tensor) -> None:
        """Adds what x and dy contribute."""
        if self.image is None:
            self.across[reader].addmm_(grad.mT, x @ self.read)
        else:
            self.image.addmm_(x.mT, grad @ self.across[reader])

    def add_weight(self, reader: str, weight: Tensor, grad: Tensor) -> None:
        """Adds G itself."""
        if self.image is None:
            self.across[reader].addmm_(grad, self.read)
        else:
            self.image.addmm_(grad.mT, self.across[reader])

    def images(self) -> list[Tensor]:
        """GV of every reader, or GᵀU."""
        return list(self.across.values()) if self.image is None else [self.image]

    def result(self) -> Spectrum:
        """The top right singular vectors of G."""
        image = torch.cat(list(self.across.values()))
        values, vectors = supports.ritz(image[:, : self.columns], self.basis)
        support = vectors[:, : self.rank].mT.contiguous()
        return Spectrum(support, _squares(values, self.rank), self.total(image))


def _squares(values: Tensor, rank: int) -> Tensor:
    """The first ``rank`` squared, zeros where there are fewer."""
    out = torch.zeros(rank, dtype=torch.float64, device="cpu")
    first = values[:rank].double().square().cpu()
    out[: len(first)] = first
    return out
