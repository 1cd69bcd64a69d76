"""HRA: products of reflections."""

from dataclasses import dataclass

from oftfx.errors import SpecError
from oftfx.spec.base import Spec
from oftfx.spec.fields import check_int, check_number


@dataclass(frozen=True, kw_only=True)
class HRA(Spec):
    """A product of reflections: ``x ← x·∏(I − 2 u_i u_iᵀ)``, every u_i learned.

    ``rank·d`` trainable numbers; computed as one map of the few directions the u_i span
    (HRA 2405.17484).

    Attributes:
        rank: How many reflections; even, as they start in equal pairs that cancel.
        weight: λ of the regulariser ``‖I − UUᵀ‖_F²``, which draws the u_i apart:
            [`oftfx.penalty`][oftfx.penalty].
    """

    rank: int = 8
    weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self, "rank", minimum=2)
        if self.rank % 2:
            raise SpecError(
                f"rank={self.rank}: must be even: an odd number of reflections is no rotation and "
                "cannot start at the identity."
            )
        check_number(self, "weight")
