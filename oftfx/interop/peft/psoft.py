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
from oftfx.interop.peft.uniform import uniform
from oftfx.rotations import oft as blocks
from oftfx.rotations.supports import Weight
from oftfx.spec import PSOFT

_THETA, _A, _B = "psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"
_SAME = 1e-4
"""How far apart directions may be, as unit vectors, to be the same."""

SUFFIXES: tuple[str, ...] = (_THETA, _A, _B)
EMBEDDED: Mapping[str, str] = {}
FIELDS = frozenset(
    {
        "ab_svd_init",
        "cayley_neumann_eps",
        "fan_in_fan_out",
        "num_cayley_neumann_terms",
        "psoft_alpha",
        "psoft_dropout",
        "psoft_mag_a",
        "psoft_mag_b",
        "psoft_orth",
        "psoft_svd",
        "psoft_svd_lowrank_niter",
        "r",
        "random_seed",
        "use_cayley_neumann",
    }
)
OUTPUTS: tuple[str, ...] = ()


def fields(found: Directory) -> dict[str, Any]:
    """Order, and whether there are scales.

    Raises:
        CheckpointError: A variant that no spec stands for.

    Warns:
        OftfxWarning: It was trained with dropout.
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
    if dropout := found.value("psoft_dropout", 0.0, (int, float)):
        warnings.warn(
            f"{where}: psoft_dropout={dropout} drops what PSOFT reads, which no spec stands for: "
            "further training is without it. The function is the same.",
            OftfxWarning,
            stacklevel=2,
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


def theirs(spec: PSOFT, tensors: Mapping[str, Tensor], weight: Weight) -> dict[str, Tensor]:
    """``psoft_R.weight``, and with scales ``psoft_R.vector_a`` and ``_b``, for PEFT's own vectors.

    A direction and its opposite are the same plane's, turned the other way.

    Raises:
        CheckpointError: The directions are not those that PEFT computes from this weight.
    """
    support = tensors["support"]
    peft = _vectors(weight().float(), spec.rank).to(support)
    signs = (support * peft).sum(-1).sign()
    apart = float((signs[:, None] * peft - support).norm(dim=-1).max())
    if not apart <= _SAME:
        raise CheckpointError(
            f"its directions differ by up to {apart:.1e} from the singular vectors that PEFT will "
            f"compute of this weight (svd='full' and a rotation of its own give the same); "
            "format='lora' is exact whatever they are."
        )
    rows, columns = torch.triu_indices(spec.rank, spec.rank, 1)
    out = {_THETA: -blocks.entries(tensors["theta"], spec) * signs[rows] * signs[columns]}
    if spec.relaxed:
        out |= {_A: 1 + tensors["alpha"], _B: 1 + tensors["beta"]}
    return out


def config(specs: Mapping[str, PSOFT], widths: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's fields.

    Raises:
        CheckpointError: A guard, an order PEFT has no number of terms for, or fields that differ
            between sites.
    """
    one = uniform(specs, "rank", "order", "exact", "relaxed")
    return {
        "ab_svd_init": "psoft_init",
        "cayley_neumann_eps": None,
        "fan_in_fan_out": False,
        "psoft_alpha": one.rank,  # over r, it scales nothing
        "psoft_dropout": 0.0,
        "psoft_mag_a": one.relaxed,
        "psoft_mag_b": one.relaxed,
        "psoft_orth": True,
        "psoft_svd": "full",
        "r": one.rank,
        **oft.series_fields(one),
    }


def _support(found: Directory, spec: PSOFT, weight: Tensor) -> Tensor:
    warnings.warn(
        f"{found.path}: PEFT stores no singular vectors with PSOFT; they are computed anew from "
        "this base, as PEFT does. On another machine their signs may differ: save with oftfx.save, "
        "which keeps them.",
        OftfxWarning,
        stacklevel=2,
    )
    return _vectors(weight, spec.rank)


def _vectors(weight: Tensor, rank: int) -> Tensor:
    """The singular vectors, by the call that PEFT makes."""
    return torch.linalg.svd(weight, full_matrices=False)[2][:rank].contiguous()
