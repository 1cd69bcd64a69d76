"""PSOFT and LOFT: rotations within a few directions of the input."""

from dataclasses import dataclass
from typing import Literal

from oftfx.errors import SpecError
from oftfx.spec.base import Spec
from oftfx.spec.fields import check_choice, check_int, check_series, check_type


@dataclass(frozen=True, kw_only=True)
class _Subspace(Spec):
    """Fields of the methods that turn a few directions of a layer's input."""

    rank: int = 64
    order: int = 4
    exact: bool = False
    guard: Literal["rescale", "exact"] | None = None
    unit_rate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self, "rank", minimum=2)
        check_series(self)

    @property
    def block_size(self) -> int:
        """The subspace is one block: its skew matrix is as wide as the rank."""
        return self.rank


@dataclass(frozen=True, kw_only=True)
class PSOFT(_Subspace):
    """Rotation within the top right singular vectors of a layer's weight: PSOFT (2505.11235).

    ``x ← x + (x·Aᵀ)·(T − I)·A`` with A the top-r right singular vectors of W, fixed and saved with
    the adapter, and ``T = diag(1+α)·R·diag(1+β)``: ``r(r−1)/2`` trainable numbers a layer for R
    in SO(r), and 2r for the vectors. Folded, W's principal part ``WAᵀA`` becomes ``WAᵀTᵀA`` and
    the rest of W stays.

    Sites that share a rotation (``share_inputs``) have the singular vectors of their stacked
    weights.

    Attributes:
        rank: r, at most the layer's input width. Beyond the weight's own rank the directions are
            arbitrary.
        relaxed: With the vectors α and β. Without them the map is orthogonal, and all angles and
            norms of W's rows are kept.
        svd: "randomized" (seeded, with oversampling; nothing wider than W or than r + 8 is made)
            or "full" (iterated until they are exact to W's dtype; nothing wider than 3(r + 8)).
        order: k of the Cayley–Neumann series, as for OFT.
        exact: The exact Cayley transform instead of the series.
        guard: What to do as ‖Q‖₂ nears 1, as for OFT. Of iid entries ‖Q‖₂ grows with √r.
        unit_rate: A learning rate that is an angle, whatever the rank, as for OFT.
    """

    relaxed: bool = True
    svd: Literal["randomized", "full"] = "randomized"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type(self, "relaxed", bool)
        check_choice(self, "svd", ("randomized", "full"))


@dataclass(frozen=True, kw_only=True)
class LOFT(_Subspace):
    """Rotation within a fixed subspace of a layer's input: LOFT (2605.11872).

    ``x ← x + (x·Pᵀ)·(T − I)·P``; P has r orthonormal rows, is made once and saved with the adapter.

    Sites that share a rotation (``share_inputs``) count as one layer: their weights and their
    gradients are stacked.

    Attributes:
        rank: r, at most the layer's input width.
        support: P. "skew": the planes in which turning changes the loss most, by the skew part of
            WᵀG; "gradient": the top right singular vectors of the loss's gradient G; both need
            ``oftfx.adapt(..., calibration=batches)``. "principal": the top right singular vectors
            of W. "random": orthonormalised Gaussian directions. "coordinate": random coordinates.
        core: "orthogonal": T in SO(r), ``r(r−1)/2`` trainable numbers. "free": any T, r².
        order: k of the Cayley–Neumann series, as for OFT; of orthogonal cores.
        exact: The exact Cayley transform instead of the series.
        guard: What to do as ‖Q‖₂ nears 1, as for OFT.
        unit_rate: A learning rate that is an angle, whatever the rank, as for OFT.
    """

    support: Literal["skew", "gradient", "principal", "random", "coordinate"] = "skew"
    core: Literal["orthogonal", "free"] = "orthogonal"

    @property
    def calibrated(self) -> bool:
        """Whether the directions depend on the loss."""
        return self.support in ("skew", "gradient")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "support", ("skew", "gradient", "principal", "random", "coordinate"))
        check_choice(self, "core", ("orthogonal", "free"))
        if self.support == "skew" and self.rank % 2:
            raise SpecError(
                f"rank={self.rank}: must be even with support='skew', whose directions come in "
                "planes: a skew matrix's singular values are pairs, and half a plane turns nothing."
            )
