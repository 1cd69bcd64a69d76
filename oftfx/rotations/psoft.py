"""PSOFT: a rotation within the top right singular vectors of a weight, between two scalings."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.ops.factor import Factor
from oftfx.ops.subspace import SUBSPACE
from oftfx.rotations import cayley, oft, supports
from oftfx.spec import PSOFT

FIXED = frozenset({"support"})


def shapes(spec: PSOFT, width: int) -> dict[str, tuple[int, ...]]:
    """``theta`` (r(r−1)/2,), ``alpha`` and ``beta`` (r,) when relaxed, ``support`` (r, width)."""
    r = spec.rank
    vectors = {"alpha": (r,), "beta": (r,)} if spec.relaxed else {}
    return {"theta": (r * (r - 1) // 2,), **vectors, "support": (r, width)}


def misfit(spec: Any, width: int) -> str | None:
    """Why this spec cannot rotate an input of this width, and what would; None when it can."""
    if spec.rank <= width:
        return None
    return f"rank={spec.rank} exceeds its input width {width}: at most {width} directions exist"


def start(spec: PSOFT, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The identity, or skew entries of the spec's standard deviation; the vectors are 1."""
    trained = {name: shape for name, shape in shapes(spec, width).items() if name not in FIXED}
    vectors = {name: torch.zeros(shape, device="cpu") for name, shape in trained.items()}
    return vectors | {"theta": oft.around_zero(spec, trained["theta"], generator)}


def fixed(
    spec: PSOFT, width: int, generator: torch.Generator, weight: supports.Weight
) -> dict[str, Tensor]:
    """The top right singular vectors of the weight."""
    find = supports.principal if spec.svd == "randomized" else supports.principal_exact
    return {"support": find(weight(), spec.rank, generator)}


def cores(tensors: Mapping[str, Tensor], spec: PSOFT) -> tuple[Tensor, Tensor]:
    """The support (…, r, width), and ``T − I`` (…, r, r), at least float32."""
    return oft.wide(tensors["support"]), kernel(tensors, spec)


def factors(cores: Sequence[Any], spec: Any) -> tuple[Factor]:
    """One factor."""
    return (Factor(SUBSPACE, (cores[0], cores[1])),)


def health(tensors: Mapping[str, Tensor], spec: PSOFT) -> tuple[Tensor, Tensor]:
    """‖Q‖₂, and ‖TᵀT − I‖₂: by the error law, or measured when relaxed."""
    norm = oft.norm(tensors["theta"].unsqueeze(-2), spec)
    error = oft.orthogonality_error(norm, spec)
    return norm[..., 0], defect(kernel(tensors, spec)) if spec.relaxed else error[..., 0]


def kernel(tensors: Mapping[str, Tensor], spec: PSOFT) -> Tensor:
    """``diag(1+α)·R·diag(1+β) − I`` from ``R − I``: exactly zero where all parameters are."""
    turned = rotation(tensors["theta"], spec)
    if not spec.relaxed:
        return turned
    a, b = tensors["alpha"].to(turned.dtype), tensors["beta"].to(turned.dtype)
    scaled = (1 + a).unsqueeze(-1) * turned * (1 + b).unsqueeze(-2)
    return scaled + torch.diag_embed(a + b + a * b)


def rotation(theta: Tensor, spec: oft.Blocks) -> Tensor:
    """``R − I``, (…, r, r), of one block as wide as the rank, at least float32."""
    return oft.core(theta.unsqueeze(-2), spec).squeeze(-3)


def defect(kernel: Tensor) -> Tensor:
    """``‖TᵀT − I‖₂`` of T = I + K to within 1 %, without waiting for the device."""
    error = kernel + kernel.mT + kernel.mT @ kernel
    return cayley.spectral_norm(error, multiplicity=1)
