"""HQQ's `HQQLinear`: groups of a few bits with a scale and a zero point each."""

from typing import Any

from torch import Tensor, nn

from oftfx.sites.matmul import Layout
from oftfx.sites.naming import is_a
from oftfx.sites.quantised import no_gradient

KIND = "hqq"
CLASS = "hqq.core.quantize.HQQLinear"
LAYOUT: Layout = "out_in"
REQUANTISES = True


def owns(module: nn.Module) -> bool:
    """Whether the module is an HQQLinear; its forward is no mark, the library exchanges it."""
    return is_a(module, CLASS)


def shape(module: Any) -> tuple[int, int]:
    """Shape of W: (out, in)."""
    return module.out_features, module.in_features


def fault(module: Any) -> str:
    """Why nothing can be trained through this layer as it is; empty when it can."""
    return "" if module.ready else "it is not quantised yet: call its initialize()"


def ends_gradient(module: nn.Module) -> bool:
    """Whether the backend it is set to gives its input no gradient."""
    return no_gradient(module, shape(module)[1])


def pin(module: nn.Module) -> None:
    """Nothing to do: the weight stays as it is."""


def unpin(module: nn.Module) -> None:
    """Nothing to do."""


def dequantise(module: Any) -> Tensor:
    """W as float32, (out, in)."""
    return module.dequantize().detach().float()


def requantise(module: Any, weight: Tensor) -> None:
    """Stores another W, (out, in), in the layer's own format."""
    held = module.W_q
    del module.W_q  # it sets a tensor first, which no parameter's name takes
    try:
        module.quantize(weight.to(module.compute_dtype), **module.quant_config)
    except BaseException:
        module.W_q = held
        raise
