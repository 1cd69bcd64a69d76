"""qGOFT: GOFT's tree with a free 2×2 block for each pair, and a regulariser for its columns."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oftfx.rotations import goft
from oftfx.rotations.goft import factors, misfit
from oftfx.rotations.oft import around_zero
from oftfx.spec import QGOFT

__all__ = ["FIXED", "cores", "factors", "health", "misfit", "penalty", "shapes", "start"]

FIXED: frozenset[str] = frozenset()


def shapes(spec: QGOFT, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a site's parameters: ``(d − 1, 2, 2)`` blocks less I, ``(d,)`` scales less one."""
    return {"blocks": (width - 1, 2, 2)} | goft.scale_shape(spec, width)


def start(spec: QGOFT, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The identity, or entries of the spec's standard deviation around it."""
    return {
        name: around_zero(spec, shape, generator) for name, shape in shapes(spec, width).items()
    }


def cores(tensors: Mapping[str, Tensor], spec: Any) -> tuple[Tensor]:
    """The residual blocks, ``(…, d − 1, 2, 2)``."""
    return (goft.scaled(_blocks(tensors), tensors),)


def health(tensors: Mapping[str, Tensor], spec: QGOFT) -> tuple[Tensor, Tensor]:
    """``tan(θ/2)`` of the nearest rotation and ``‖BᵀB − I‖₂`` of the worst block."""
    return goft.block_health(*cores(tensors, spec))


def penalty(tensors: Mapping[str, Tensor], spec: QGOFT) -> Tensor:
    """``λ Σ ⟨column 1, column 2⟩²`` over the blocks of each site, ``(…)``."""
    b = _blocks(tensors)
    eye = torch.eye(2, dtype=b.dtype, device=b.device)
    products = ((b + eye)[..., 0] * (b + eye)[..., 1]).sum(-1)
    return spec.weight * products.square().sum(-1)


def _blocks(tensors: Mapping[str, Tensor]) -> Tensor:
    blocks = tensors["blocks"]
    return blocks.to(torch.promote_types(blocks.dtype, torch.float32))
