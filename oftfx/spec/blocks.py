"""OFT, COFT and BOFT: rotations of blocks of coordinates."""

from dataclasses import dataclass
from typing import Literal

from oftfx.errors import SpecError
from oftfx.spec.base import Spec
from oftfx.spec.fields import check_int, check_number, check_series, check_type


@dataclass(frozen=True, kw_only=True)
class OFT(Spec):
    """Block-diagonal rotation of a layer's input: OFT, OFTv2.

    ``x ← x·blockdiag(R_1 … R_{d/b})`` with ``R_i`` in SO(b) from a skew ``Q_i``, ``b(b−1)/2``
    trainable numbers a block (OFT 2306.07280; OFTv2 2506.19847).

    Attributes:
        block_size: b, which must divide the layer's input width.
        order: k of the Cayley–Neumann series ``(I+Q)(I+Q+…+Q^k)``. Even k is quadratically
            closer to orthogonal than odd k.
        exact: The exact Cayley transform ``(I+Q)(I−Q)⁻¹`` instead of the series.
        guard: What to do as ‖Q‖₂ nears 1, beyond which the series means nothing: ``None`` leaves
            it (``oftfx.health`` warns); from ‖Q‖₂ = 0.9 on, ``"rescale"`` shrinks Q back to there
            and ``"exact"`` uses the exact transform for that block.
        share_blocks: One block's parameters for all blocks of a site.
        dropout: Probability with which a block is the identity in a forward in training mode
            (multiplicative dropout, BOFT 2311.06243).
        magnitude: A trainable factor for each output of a layer besides, ``y ← diag(1 + m)·y``
            before the bias (re-scaled OFT, 2306.07280). Each layer has its own, also where layers
            share a rotation.
        unit_rate: Measures the parameters in units of an angle: a step of Adam turns no direction
            by more radians than its learning rate, whatever the block size. Otherwise a parameter
            is an entry of Q, and the same step may turn ``2(b − 1)`` times as far.
        doubled: The series ends with ``2Q^{k+1}`` instead of ``Q^{k+1}``, as HF PEFT 0.16 and 0.17
            computed it: for adapters that were trained so, as it is less near to orthogonal.
    """

    block_size: int = 32
    order: int = 4
    exact: bool = False
    guard: Literal["rescale", "exact"] | None = None
    share_blocks: bool = False
    dropout: float = 0.0
    magnitude: bool = False
    unit_rate: bool = False
    doubled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self, "block_size", minimum=2)
        check_series(self)
        check_type(self, "doubled", bool)
        if self.doubled and (self.exact or self.guard):
            raise SpecError("doubled=True is the bare series: leave exact and guard out.")
        check_type(self, "share_blocks", bool)
        check_number(self, "dropout", below=1.0)
        check_type(self, "magnitude", bool)


@dataclass(frozen=True, kw_only=True)
class COFT(OFT):
    """OFT that stays near the identity: every ``‖Q_i‖_F`` at most ``eps / √(d/b)``.

    The parameters themselves are projected, by [`oftfx.project`][oftfx.project] after each
    optimizer step (OFT 2306.07280).

    Attributes:
        eps: ‖Q‖_F that a whole site may reach.
    """

    eps: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "eps")


@dataclass(frozen=True, kw_only=True)
class BOFT(OFT):
    """A product of block-diagonal rotations, each over blocks of more distant coordinates.

    ``x ← x·F_{m−1} … F_0``, where a block of ``F_j`` takes two runs of b/2 neighbouring coordinates
    that start 2^j · b/2 apart, as a butterfly does: m factors join 2^{m−1}·b coordinates, with
    ``m·d(b−1)/2`` trainable numbers (BOFT 2311.06243).

    Attributes:
        factors: m, for which ``2^{m−1}·b`` must divide the layer's input width. With 1 it is OFT.
    """

    factors: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self, "factors", minimum=1)
        if self.factors > 1 and self.block_size % 2:
            raise SpecError(
                f"block_size={self.block_size}: must be even for factors={self.factors}, whose "
                "blocks are joined from two halves."
            )
