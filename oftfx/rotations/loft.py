"""LOFT: a rotation, or any map, within a fixed subspace of the input."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.factor import Factor
from oftfx.rotations import cayley, oft, psoft, supports
from oftfx.spec import LOFT

FIXED = psoft.FIXED

misfit = psoft.misfit


def shapes(spec: LOFT, width: int) -> dict[str, tuple[int, ...]]:
    """``theta`` (r(r−1)/2,), or ``kernel`` (r, r) of a free core; ``support`` (r, width)."""
    r = spec.rank
    trained = {"kernel": (r, r)} if spec.core == "free" else {"theta": (r * (r - 1) // 2,)}
    return {**trained, "support": (r, width)}


def start(spec: LOFT, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The identity, or skew (or free) entries of the spec's standard deviation."""
    name, shape = next(iter(shapes(spec, width).items()))
    return {name: oft.around_zero(spec, shape, generator)}


def fixed(
    spec: LOFT, width: int, generator: torch.Generator, weight: supports.Weight
) -> dict[str, Tensor]:
    """The support of a spec that needs no calibration."""
    if spec.support == "random":
        return {"support": supports.random(width, spec.rank, generator)}
    if spec.support == "coordinate":
        return {"support": supports.coordinate(width, spec.rank, generator)}
    return {"support": supports.principal(weight(), spec.rank, generator)}


def cores(tensors: Mapping[str, Tensor], spec: LOFT) -> tuple[Tensor, Tensor]:
    """The support (…, r, width), and ``T − I`` (…, r, r), at least float32."""
    return oft.wide(tensors["support"]), kernel(tensors, spec)


def factors(cores: Sequence[Any], spec: LOFT) -> tuple[Factor]:
    """One factor."""
    return psoft.factors(cores, spec)


def health(tensors: Mapping[str, Tensor], spec: LOFT) -> tuple[Tensor, Tensor]:
    """‖Q‖₂ and, by the error law, ‖TᵀT − I‖₂.

    Of a free core, ‖T − I‖₂/2, which is ‖Q‖₂ of a small rotation, and the measured error.
    """
    if spec.core == "free":
        free = kernel(tensors, spec)
        return cayley.spectral_norm(free, multiplicity=1) / 2, psoft.defect(free)
    norm = oft.norm(tensors["theta"].unsqueeze(-2), spec)
    return norm[..., 0], oft.orthogonality_error(norm, spec)[..., 0]


def kernel(tensors: Mapping[str, Tensor], spec: LOFT) -> Tensor:
    """``T − I``, at least float32: of a free core the parameter itself, or in units of an angle.

    With entries of at most e, ``‖K‖₂ ≤ e·r``, reached by entries of one sign.
    """
    if spec.core == "free":
        free = oft.wide(tensors["kernel"])
        return free / spec.rank if spec.unit_rate else free
    return psoft.rotation(tensors["theta"], spec)
