"""PEFT's methods by the name it gives them."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from oftfx.interop.peft import hra, oft, psoft
from oftfx.interop.peft.directory import Directory
from oftfx.rotations.supports import Weight
from oftfx.spec import BOFT, COFT, HRA, OFT, PSOFT, Spec


class Readable(Protocol):
    """What the file of a method that is read defines.

    Attributes:
        SUFFIXES: How the names of one layer's tensors end, after the layer's own name.
    """

    SUFFIXES: tuple[str, ...]

    def fields(self, found: Directory) -> dict[str, Any]:
        """The spec's fields that hold at every layer.

        Raises:
            CheckpointError: PEFT computes something that no spec stands for.
        """

    def fields_at(self, found: Directory, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The spec's fields that one layer's tensors, by suffix, tell.

        Raises:
            CheckpointError: Their shapes are not what PEFT writes for this config.
        """

    def ours(
        self, found: Directory, spec: Any, tensors: Mapping[str, Tensor], weight: Weight
    ) -> dict[str, Tensor]:
        """A rotation's tensors from PEFT's; ``weight`` is called only where they depend on W."""


class Format(Readable, Protocol):
    """What the file of a method that is written, too, defines."""

    def theirs(self, spec: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's tensors, by suffix, from a rotation's."""

    def config(self, specs: Mapping[str, Any], widths: Mapping[str, int]) -> dict[str, Any]:
        """The method's part of the config, from each site's spec and width.

        Raises:
            CheckpointError: PEFT has no config for these specs. Says which site or field.
        """


READS: dict[str, Readable] = {"OFT": oft, "HRA": hra, "PSOFT": psoft}
WRITES: dict[type[Spec], tuple[Format, str]] = {
    OFT: (oft, "OFT"),
    COFT: (oft, "OFT"),
    HRA: (hra, "HRA"),
}
UNWRITTEN: dict[type[Spec], str] = {
    BOFT: "BOFT is not written for PEFT yet: save it without format=.",
    PSOFT: psoft.UNWRITTEN,
}
"""Why a method that PEFT has is not written."""
