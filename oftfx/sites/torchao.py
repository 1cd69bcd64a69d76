"""torchao: an ordinary `Linear` whose weight is a quantised tensor."""

from typing import Any

from torch import Tensor, nn

from oftfx.errors import MergeError
from oftfx.sites import linear
from oftfx.sites.matmul import Layout
from oftfx.sites.quantised import no_gradient

KIND = "torchao"
CLASS = ""  # graphs record a Linear, which they cannot tell from a float one
LAYOUT: Layout = "out_in"
REQUANTISES = False


def owns(module: nn.Module) -> bool:
    """Whether the module is a Linear over one of torchao's tensors."""
    weight = module._parameters.get("weight")
    return type(weight).__module__.partition(".")[0] == "torchao" and linear.owns(module)


def shape(module: Any) -> tuple[int, int]:
    """Shape of W: (out, in)."""
    out, width = module.weight.shape
    return out, width


def fault(module: nn.Module) -> str:
    """Nothing to find: its tensors check themselves."""
    return ""


def ends_gradient(module: nn.Module) -> bool:
    """Whether its backward gives its input no gradient, as with quantised activations."""
    return no_gradient(module, shape(module)[1])


def pin(module: nn.Module) -> None:
    """Nothing to do: the weight stays as it is."""


def unpin(module: nn.Module) -> None:
    """Nothing to do."""


def dequantise(module: Any) -> Tensor:
    """W as float32, (out, in)."""
    return module.weight.dequantize().float()


def requantise(module: nn.Module, weight: Tensor) -> None:
    """Not possible: the tensor does not tell the configuration it was made with."""
    raise MergeError("torchao's weights are quantised by its own quantize_: merge to floats first")
