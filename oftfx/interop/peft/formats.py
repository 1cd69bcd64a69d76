"""PEFT's methods by the name it gives them."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from oftfx.interop.peft import boft, hra, oft, psoft
from oftfx.interop.peft.directory import Directory
from oftfx.rotations.supports import Weight
from oftfx.spec import BOFT, COFT, HRA, OFT, PSOFT, Spec


class Format(Protocol):
    """What the file of a method defines.

    Attributes:
        SUFFIXES: How the names of one layer's tensors end, after the layer's own name.
        EMBEDDED: What ends them instead where the layer is an embedding; empty where none can be.
        FIELDS: The fields of its config that those of other methods lack.
        OUTPUTS: What a layer trains behind its matmul there, as its spec's
            [`output_shapes`][oftfx.rotations.output_shapes] name it.
    """

    SUFFIXES: tuple[str, ...]
    EMBEDDED: Mapping[str, str]
    FIELDS: frozenset[str]
    OUTPUTS: tuple[str, ...]

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
        """A site's tensors from PEFT's; ``weight`` is called only where they depend on W."""

    def theirs(self, spec: Any, tensors: Mapping[str, Tensor], weight: Weight) -> dict[str, Tensor]:
        """PEFT's tensors, by suffix, from a site's.

        Raises:
            CheckpointError: They are not what PEFT would compute from the weight.
        """

    def config(self, specs: Mapping[str, Any], widths: Mapping[str, int]) -> dict[str, Any]:
        """The method's part of the config, from each site's spec and width.

        Raises:
            CheckpointError: PEFT has no config for these specs. Says which site or field.
        """


FORMATS: dict[str, Format] = {"OFT": oft, "BOFT": boft, "HRA": hra, "PSOFT": psoft}
NAMES: dict[type[Spec], str] = {
    OFT: "OFT",
    COFT: "OFT",
    BOFT: "BOFT",
    HRA: "HRA",
    PSOFT: "PSOFT",
}
"""What PEFT calls a spec's method."""
