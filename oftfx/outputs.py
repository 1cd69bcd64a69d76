"""What a site trains behind its matmul, whoever holds the rotation before it.

before                          after
y = linear(x, W, b)             y = scale(linear(x, W, b), m, b)        (1 + m)·(xWᵀ) + b
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from oftfx.ops.factor import SCALE, Factor
from oftfx.rotations import output_shapes
from oftfx.rotations.oft import around_zero
from oftfx.spec import Spec


class Outputs(nn.Module):
    """The magnitudes of a site's outputs, less one; nothing where its spec asks for none.

    Args:
        spec: Resolved for this site.
        out: How many outputs it has.
        device: Where the parameters live.
        seed: Seeds the initial values when the spec asks for random ones.

    Attributes:
        out: How many outputs it has.
        outputs: Shapes of the parameters, by name.
        scaling: How much of what the parameters do is done; [`oftfx.scale`][oftfx.scale] sets it.
    """

    scaling: float = 1.0
    rotated: torch.Size | None = None
    """Shape of the last input that was rotated because folding the weight would cost more."""

    def __init__(self, spec: Spec, out: int, device: torch.device, seed: int) -> None:
        super().__init__()
        self.spec = spec
        self.seed = seed
        self.out = out
        self.outputs = output_shapes(spec, out)
        for name, shape in self.outputs.items():
            value = torch.empty(shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, nn.Parameter(value))
        self.reset_outputs()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.rotated = None  # on another device folding may cost less
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rotated": None}

    @torch.no_grad()
    def reset_outputs(self) -> None:
        """Sets the initial values: every output as it is, or the spec's random start."""
        # Not the streams that the rotation's own tensors start from.
        generator = torch.Generator().manual_seed(self.seed + 2)
        for name, shape in self.outputs.items():
            self.get_parameter(name).copy_(around_zero(self.spec, shape, generator))

    def magnitudes(self) -> list[Tensor]:
        """What is applied of the parameters."""
        held: list[Tensor] = [getattr(self, name) for name in self.outputs]
        return held if self.scaling == 1 else [value * self.scaling for value in held]

    def scales(self) -> tuple[Factor, ...]:
        """The factors that map the outputs."""
        return tuple(Factor(SCALE, (magnitude, None)) for magnitude in self.magnitudes())

    def scaled(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """The matmul's y, (..., out), with all but the bias scaled."""
        for magnitude in self.magnitudes():
            y = SCALE(y, magnitude, bias)
        return y

    def turned(self, rows: Tensor) -> Tensor:
        """``W Mᵀ`` of W in (out, in), by the rotation before the matmul."""
        raise NotImplementedError

    def fold(self, weight: Tensor, layout: str) -> Tensor:
        """``diag(1 + m)·W Mᵀ``: what a forward reads in place of W, dropout included."""
        rows = self.turned(weight if layout == "out_in" else weight.mT)
        for scale in self.scales():
            rows = scale(rows.mT).mT
        if layout == "out_in":
            return rows
        # Stored as W is: a BLAS may round the product with another layout otherwise.
        return rows.mT.contiguous() if weight.is_contiguous() else rows.mT
