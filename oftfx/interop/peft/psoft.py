"""PEFT's PSOFT: ``psoft_R.weight``, (r(r−1)/2,), and ``psoft_R.vector_a`` and ``_b``, (r,).

It multiplies ``x·Aᵀ`` by the transpose of ``diag(b)·R·diag(a)``, so R is that of −Q here. The
singular vectors A are not in its files: they are computed anew, by the same call on the same
weight, or their signs might differ.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oftfx.errors import CheckpointError, OftfxWarning
from oftfx.interop.peft import oft
from oftfx.interop.peft.directory import CONFIG, Directory
from oftfx.rotations.supports import Weight
from oftfx.spec import PSOFT

_THETA, _A, _B = "psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"
UNWRITTEN = (
    "PEFT's files hold no singular vectors: it computes others, with other signs, and the adapter "
    "would be another. Write format='lora', which is exact for PSOFT."
)
SUFFIXES: tuple[str, ...] = (_THETA, _A, _B)


def fields(found: Directory) -> dict[str, Any]:
    """Order, and whether there are scales.

    Raises:
        CheckpointError: A variant that no spec stands for.
    """
    where = found.path / CONFIG
    if found.value("psoft_svd", "full", str) != "full":
        raise CheckpointError(
            f"{where}: psoft_svd={found.config['psoft_svd']!r}: its B is that of an approximate "
            "factorisation and not W·Aᵀ, so what it trained is no map of the input."
        )
    for key, wanted in (("psoft_orth", True), ("ab_svd_init", "psoft_init")):
        if found.value(key, wanted, type(wanted)) != wanted:
            raise CheckpointError(f"{where}: {key}={found.config[key]!r} is no PSOFT that rotates.")
    if found.config.get("cayley_neumann_eps") is not None:
        raise CheckpointError(f"{where}: cayley_neumann_eps shrinks Q, which no spec stands for.")
    scales = {found.value(f"psoft_mag_{v}", True, bool) for v in "ab"}
    if len(scales) > 1:
        raise CheckpointError(
            f"{where}: one of psoft_mag_a and psoft_mag_b alone is no PSOFT here."
        )
    exact = not found.value("use_cayley_neumann", False, bool)
    turned = {"exact": True} if exact else oft.series(found)
    return {"method": PSOFT, "relaxed": scales.pop(), "svd": "full", **turned}


def fields_at(found: Directory, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The rank."""
    return {"rank": found.value("r", 32, int)}


def ours(
    found: Directory, spec: PSOFT, tensors: Mapping[str, Tensor], weight: Weight
) -> dict[str, Tensor]:
    """``theta``, ``alpha``, ``beta`` and the support, computed as PEFT does."""
    values = {"theta": -tensors[_THETA], "support": _support(found, spec, weight().float())}
    if spec.relaxed:
        values |= {"alpha": tensors[_A] - 1, "beta": tensors[_B] - 1}
    return values


def _support(found: Directory, spec: PSOFT, weight: Tensor) -> Tensor:
    warnings.warn(
        f"{found.path}: PEFT stores no singular vectors with PSOFT; they are computed anew from "
        "this base, as PEFT does. On another machine their signs may differ: save with oftfx.save, "
        "which keeps them.",
        OftfxWarning,
        stacklevel=2,
    )
    return torch.linalg.svd(weight, full_matrices=False)[2][: spec.rank].contiguous()
