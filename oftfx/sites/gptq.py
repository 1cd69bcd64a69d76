"""GPTQ and AWQ: int32 words of packed groups, in layers of several libraries.

They are rotated and trained through; what their words mean differs from kernel to kernel, so
folding is left to the library that can dequantise them.
"""

from typing import Any

from torch import Tensor, nn

from oftfx.errors import MergeError
from oftfx.sites.matmul import Layout
from oftfx.sites.naming import class_of
from oftfx.sites.quantised import no_gradient


class Words:
    """Layers of some libraries that hold `qweight` in place of `weight`.

    Args:
        kind: The site kind, as plans print it.
        packages: The packages that such layers' classes come from.
    """

    CLASS = ""  # many
    LAYOUT: Layout = "out_in"
    REQUANTISES = False

    def __init__(self, kind: str, packages: tuple[str, ...]) -> None:
        self.KIND = kind
        self.packages = packages

    def owns(self, module: nn.Module) -> bool:
        """Whether the module is such a layer."""
        known = any(cls.__module__.startswith(self.packages) for cls in class_of(module).__mro__)
        return known and hasattr(module, "qweight")

    def shape(self, module: Any) -> tuple[int, int]:
        """Shape of W: (out, in)."""
        if hasattr(module, "infeatures"):
            return module.outfeatures, module.infeatures
        return module.out_features, module.in_features

    def fault(self, module: nn.Module) -> str:
        """Nothing to find: the words tell nothing."""
        return ""

    def ends_gradient(self, module: nn.Module) -> bool:
        """Whether its kernel gives its input no gradient."""
        return no_gradient(module, self.shape(module)[1])

    def pin(self, module: nn.Module) -> None:
        """Nothing to do: the words stay as they are."""

    def unpin(self, module: nn.Module) -> None:
        """Nothing to do."""

    def dequantise(self, module: nn.Module) -> Tensor:
        """Not possible."""
        raise MergeError(
            f"folding needs the weight as floats, and {self.KIND} layers are not dequantised here: "
            "keep the adapter beside the base, or load it on the float model and merge that"
        )

    def requantise(self, module: nn.Module, weight: Tensor) -> None:
        """Not possible: quantising anew takes the library's calibration."""
        self.dequantise(module)


GPTQ = Words("gptq", ("gptqmodel.nn_modules.qlinear", "auto_gptq.nn_modules.qlinear"))
AWQ = Words("awq", ("awq.modules.linear", "gptqmodel.nn_modules.qlinear.awq"))
