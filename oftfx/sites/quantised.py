"""What is the same for every library of quantised layers."""

from collections.abc import Hashable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oftfx.sites.matmul import Layout
from oftfx.sites.naming import class_of


@runtime_checkable
class Quantiser(Hashable, Protocol):
    """A [`Provider`][oftfx.sites.Provider] of layers whose weight is not stored as floats.

    The layer stands for ``y = x·Wᵀ + bias`` with W (out, in), whatever it holds in place of W.
    """

    KIND: str
    CLASS: str
    LAYOUT: Layout
    REQUANTISES: bool
    """Whether a folded weight can go back into the format; if not, `requantise` raises."""

    def owns(self, module: nn.Module) -> bool:
        """Whether this provider knows the module."""

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Shape of W: (out, in)."""

    def fault(self, module: nn.Module) -> str:
        """Why nothing can be trained through this layer as it is; empty when it can."""

    def ends_gradient(self, module: nn.Module) -> bool:
        """Whether its backward gives its input no gradient, so that nothing before it trains."""

    def pin(self, module: nn.Module) -> None:
        """Keeps the layer from rewriting its weight between calls; called when it is adapted."""

    def unpin(self, module: nn.Module) -> None:
        """Undoes `pin`."""

    def dequantise(self, module: nn.Module) -> Tensor:
        """W as floats, (out, in), at least float32.

        Raises:
            MergeError: This library cannot.
        """

    def requantise(self, module: nn.Module, weight: Tensor) -> None:
        """Stores another W, (out, in), in the layer's own format.

        Raises:
            MergeError: This library cannot.
        """


class Fusing(Protocol):
    """A [`Provider`][oftfx.sites.Provider] of layers whose matmul can rotate as well, in one op."""

    CLASS: str
    DEFERS: bool
    """Whether layers that read one x leave the gradients they have in common to each other."""

    def fuses(
        self,
        module: nn.Module,
        x: Tensor,
        dtype: torch.dtype,
        block: int | None,
        outs: tuple[int, ...],
    ) -> bool:
        """Whether that costs less than rotating x first, and gives the layer's bits where C = 0.

        Args:
            module: The layer.
            x: Its input.
            dtype: What x is cast to before.
            block: Width of the rotation's blocks.
            outs: How many outputs the layers have that read x, each with a rotation of its own;
                none of them where they share one.
        """

    def multiplied(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The layer's output, bit for bit, with a cheaper gradient of x; None where none is.

        Args:
            module: The layer.
            x: Its input, turned, a plain tensor of which another library makes products faster
                (`gains`); in a training step without autocast, where no mode or tracer listens.
        """

    def rotated_linear(
        self, module: nn.Module, x: Tensor, core: Tensor | None, deferred: bool
    ) -> Tensor:
        """The layer's output for ``x·blockdiag(I + C_1 … I + C_n)``.

        Args:
            module: The layer.
            x: Its input.
            core: (n, b, b); None of an x that is turned already, which only a deferred one is.
            deferred: Whether x comes from [`defer`][oftfx.ops.defer], or from what goes on through
                its producer: which has the gradients.
        """


class StandIn(nn.Linear):
    """The float layer that a quantised one stands for, on `meta`: what planning sees of it."""

    def forward(self, input: Tensor) -> Tensor:
        """A plain matmul, in the dtype of its input, as quantised layers compute."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


def stand_in(module: nn.Module, quantiser: Quantiser) -> StandIn:
    """What planning traces in place of a quantised layer."""
    out, width = quantiser.shape(module)
    return StandIn(width, out, bias=getattr(module, "bias", None) is not None, device="meta")


def no_gradient(module: nn.Module, width: int) -> bool:
    """Whether a layer's own backward gives its input no gradient; found by asking it for one."""
    device = device_of(module)
    if device.type == "meta":
        return False
    floats = [p.dtype for p in module.parameters(recurse=False) if p.is_floating_point()]
    dtypes = dict.fromkeys((*floats, torch.float16, torch.bfloat16, torch.float32))
    for dtype in dtypes:  # the first that the layer takes
        x = torch.zeros(1, width, dtype=dtype, device=device, requires_grad=True)
        try:
            with torch.enable_grad():
                y = class_of(module).forward(module, x)
                (grad,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
        except Exception:  # whatever a kernel raises for a dtype or device that it does not take
            continue
        return grad is None
    return True


def device_of(module: nn.Module) -> torch.device:
    """Where a quantised layer lives, which of its tensors there may be."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def to_linear(module: nn.Module, weight: Tensor) -> None:
    """Makes a quantised layer an ordinary `Linear` with this weight (out, in), in place.

    The object stays, and with it its names, its hooks and its place in the model.
    """
    out, width = weight.shape
    bias = getattr(module, "bias", None)
    plain = nn.Linear(width, out, bias=bias is not None, device="meta")
    state = {key: value for key, value in vars(module).items() if key in vars(plain)}
    vars(module).clear()
    vars(module).update({**vars(plain), **state})
    module.__class__ = nn.Linear
    module._parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
    module._buffers, module._modules = {}, {}
    if isinstance(bias, Tensor):
        module._parameters["bias"] = nn.Parameter(bias.detach().to(weight.dtype), False)
