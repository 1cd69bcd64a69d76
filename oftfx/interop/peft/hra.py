"""PEFT's HRA: ``hra_u``, (in, r), one direction a column; it reflects x by the last one first."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from oftfx.errors import CheckpointError
from oftfx.interop.peft.directory import CONFIG, Directory
from oftfx.interop.peft.uniform import uniform
from oftfx.rotations.supports import Weight
from oftfx.spec import HRA

SUFFIXES: tuple[str, ...] = ("hra_u",)
EMBEDDED: Mapping[str, str] = {}
FIELDS = frozenset(("apply_GS", "r"))
OUTPUTS: tuple[str, ...] = ()


def fields(found: Directory) -> dict[str, Any]:
    """None.

    Raises:
        CheckpointError: It orthogonalises its directions.
    """
    if found.value("apply_GS", False, bool):
        raise CheckpointError(
            f"{found.path / CONFIG}: apply_GS=True computes with orthogonalised directions, which "
            "no spec stands for (and which never is the identity)."
        )
    return {"method": HRA}


def fields_at(found: Directory, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The rank, which a layer's tensor tells.

    Raises:
        CheckpointError: It is odd.
    """
    u = tensors["hra_u"]
    if u.dim() != 2 or u.shape[1] % 2:
        raise CheckpointError(
            f"hra_u has shape {tuple(u.shape)}; an even number of columns is needed: an odd number "
            "of reflections is no rotation"
        )
    return {"rank": u.shape[1]}


def ours(
    found: Directory, spec: HRA, tensors: Mapping[str, Tensor], weight: Weight
) -> dict[str, Tensor]:
    """``u``."""
    return {"u": tensors["hra_u"].flip(1).mT.contiguous()}


def theirs(spec: HRA, tensors: Mapping[str, Tensor], weight: Weight) -> dict[str, Tensor]:
    """``hra_u``."""
    return {"hra_u": tensors["u"].mT.flip(1).contiguous()}


def config(specs: Mapping[str, HRA], widths: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's fields.

    Raises:
        CheckpointError: Ranks that differ between sites.
    """
    return {"apply_GS": False, "r": uniform(specs, "rank").rank}
