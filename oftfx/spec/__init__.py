"""What the user asks for: frozen, hashable, validated dataclasses."""

from oftfx.spec.base import METHODS, Spec
from oftfx.spec.blocks import BOFT, COFT, OFT
from oftfx.spec.pairs import GOFT, QGOFT
from oftfx.spec.reflections import HRA
from oftfx.spec.rules import ALL_LINEAR, Target, Targets, matches
from oftfx.spec.subspace import LOFT, PSOFT

__all__ = [
    "ALL_LINEAR",
    "BOFT",
    "COFT",
    "GOFT",
    "HRA",
    "LOFT",
    "METHODS",
    "OFT",
    "PSOFT",
    "QGOFT",
    "Spec",
    "Target",
    "Targets",
    "matches",
]

METHODS |= {cls.__name__: cls for cls in (OFT, COFT, BOFT, GOFT, QGOFT, HRA, PSOFT, LOFT)}
