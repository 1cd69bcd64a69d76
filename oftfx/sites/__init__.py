"""What counts as a matmul with a frozen weight.

`matmul.py` knows the spellings of such a node in a graph, `gemm_4bit.py` and `int8.py` those of
bitsandbytes; `quantised.py`, `naming.py` and `pretrained.py` are what providers share. Every other
file is a provider, of one library's modules. Adding one means adding its file to `PROVIDERS`.

    before                after, whatever the library multiplies by
    y = x·W               x' = rotate(x, cayley(theta))
                          y = x'·W
"""

import functools
from collections.abc import Hashable
from typing import Protocol

from torch import fx, nn

from oftfx.sites import bitsandbytes, conv1d, embedding, gptq, hqq, linear, torchao
from oftfx.sites.matmul import Layout
from oftfx.sites.naming import forward_in
from oftfx.sites.quantised import Fusing, Quantiser


class Provider(Hashable, Protocol):
    """One kind of module whose forward is ``y = x·W`` for its first input.

    Attributes:
        KIND: The site kind, as plans print it.
        CLASS: Qualified name of the module's class, as exported graphs record it.
        LAYOUT: How the weight is stored.
    """

    KIND: str
    CLASS: str
    LAYOUT: Layout

    def owns(self, module: nn.Module) -> bool:
        """Whether this provider knows the module."""


PROVIDERS: tuple[Provider, ...] = (
    torchao,  # before the Linear that it is besides
    linear,
    conv1d,
    bitsandbytes.LINEAR4BIT,
    bitsandbytes.LINEAR8BIT,
    hqq,
    gptq.AWQ,  # before GPTQ, whose library has such layers, too
    gptq.GPTQ,
)


def provider_of(module: nn.Module) -> Provider | None:
    """The provider that knows this module, if any."""
    return next((provider for provider in PROVIDERS if provider.owns(module)), None)


def is_embedding(module: nn.Module) -> bool:
    """Whether the module is an embedding whose rows can be rotated."""
    return embedding.owns(module)


def quantiser_of(module: nn.Module) -> Quantiser | None:
    """The provider that knows this module, if it is a quantised layer."""
    return as_quantiser(provider_of(module))


@functools.cache  # a protocol's check takes longer than all that providers ask of a module
def as_quantiser(provider: Provider | None) -> Quantiser | None:
    """A provider of quantised layers; None for one of others."""
    return provider if isinstance(provider, Quantiser) else None


FUSING: tuple[Fusing, ...] = (linear, bitsandbytes.LINEAR4BIT)


def fusing(cls: type[nn.Module]) -> Fusing | None:
    """What rotates and multiplies in one op for layers of this class, if anything does."""
    return next((f for f in FUSING if forward_in(cls) == f"{f.CLASS}.forward"), None)


def quantised_layers(model: object) -> dict[str, tuple[nn.Module, Quantiser]]:
    """The quantised layers of an nn.Module by their weight's name; a graph has none."""
    if not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule):
        return {}
    return {
        f"{fqn}.weight" if fqn else "weight": (module, quantiser)
        for fqn, module in model.named_modules()
        if (quantiser := quantiser_of(module)) is not None
    }


def is_quantised(kind: str) -> bool:
    """Whether sites of this kind belong to quantised layers."""
    return any(kind == p.KIND and as_quantiser(p) is not None for p in PROVIDERS)


def provider_named(cls: str) -> Provider | None:
    """The provider of modules whose class has this qualified name, if any."""
    return next((provider for provider in PROVIDERS if cls == provider.CLASS), None)


def shape_of(module: nn.Module, parameter: str) -> tuple[int, ...] | None:
    """Shape of a module's weight, of a quantised one that of the W it stands for; None without."""
    if parameter == "weight" and (quantiser := quantiser_of(module)) is not None:
        return quantiser.shape(module)
    weight = module._parameters.get(parameter)
    return None if weight is None else tuple(weight.shape)
