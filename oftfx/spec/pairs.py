"""GOFT and qGOFT: rotations of pairs of coordinates."""

from dataclasses import dataclass

from oftfx.spec.base import Spec
from oftfx.spec.fields import check_number, check_type


@dataclass(frozen=True, kw_only=True)
class GOFT(Spec):
    """Rotations of pairs of coordinates, in a tree that joins all of them.

    Stage s turns the pairs ``(i, i + 2^{s−1})`` for the i that are multiples of 2^s, one angle a
    pair, d − 1 in all (GOFT 2404.04316). It can turn any one vector into the first axis; it
    cannot be any rotation.

    Attributes:
        scale: A trainable factor for each coordinate besides, d more numbers; not orthogonal.
    """

    scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type(self, "scale", bool)


@dataclass(frozen=True, kw_only=True)
class QGOFT(GOFT):
    """GOFT with a free 2×2 matrix for each pair, 4(d − 1) numbers, drawn to orthogonal columns.

    It is as orthogonal as its regulariser makes it: add [`oftfx.penalty`][oftfx.penalty] to the
    loss (qGOFT 2404.04316).

    Attributes:
        weight: λ of the regulariser, the sum of ``⟨column 1, column 2⟩²`` over all pairs.
    """

    weight: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "weight")
