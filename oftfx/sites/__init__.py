"""What counts as a matmul with a frozen weight.

`matmul.py` knows the spellings of such a node in a graph; every other file here is a provider that
knows one kind of module. Adding a library means adding its file to `PROVIDERS`.
"""

from typing import Protocol

from torch import nn

from oftfx.sites import conv1d, linear
from oftfx.sites.matmul import Layout


class Provider(Protocol):
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


PROVIDERS: tuple[Provider, ...] = (linear, conv1d)


def provider_of(module: nn.Module) -> Provider | None:
    """The provider that knows this module, if any."""
    return next((provider for provider in PROVIDERS if provider.owns(module)), None)


def provider_named(cls: str) -> Provider | None:
    """The provider of modules whose class has this qualified name, if any."""
    return next((provider for provider in PROVIDERS if cls == provider.CLASS), None)
