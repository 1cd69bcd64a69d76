"""PEFT's BOFT: ``boft_R``, (m, n, b, b), and ``boft_s``, (out, 1), a factor for each output.

A block is ``(I − S)(I + S)⁻¹`` with ``S = (D − Dᵀ)/2`` of the stored D: our exact transform of −S.
The symmetric part of D means nothing; training from the identity leaves it at zero, and it is
written as zero. Where PEFT cannot compile its CUDA extension it trains one factor, whatever its
config asks for, so the tensor tells how many there are.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from oftfx.errors import CheckpointError, OftfxWarning
from oftfx.interop.peft.directory import CONFIG, TENSORS, Directory
from oftfx.interop.peft.uniform import uniform
from oftfx.rotations import cayley, oft
from oftfx.rotations.supports import Weight
from oftfx.spec import BOFT

_R, _SCALE = "boft_R", "boft_s"
SUFFIXES: tuple[str, ...] = (_R, _SCALE)
EMBEDDED: Mapping[str, str] = {}
FIELDS = frozenset(
    {
        "boft_block_num",
        "boft_block_size",
        "boft_dropout",
        "boft_n_butterfly_factor",
        "fan_in_fan_out",
    }
)
OUTPUTS: tuple[str, ...] = ("magnitude",)


def fields(found: Directory) -> dict[str, Any]:
    """The dropout.

    Warns:
        OftfxWarning: Fewer factors were trained than the config asks for.
    """
    wanted = found.value("boft_n_butterfly_factor", 1, int)
    trained = min((len(t) for key, t in found.tensors.items() if key.endswith(f".{_R}")), default=1)
    if trained < wanted:
        warnings.warn(
            f"{found.path / CONFIG} asks for {wanted} butterfly factors, and {TENSORS} holds "
            f"{trained}: without its CUDA extension PEFT trains one. It is read as it was trained.",
            OftfxWarning,
            stacklevel=2,
        )
    return {
        "method": BOFT,
        "exact": True,
        "magnitude": True,
        "dropout": found.value("boft_dropout", 0.0, (int, float)),
    }


def fields_at(found: Directory, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The number of factors and the block size, which a layer's tensor tells.

    Raises:
        CheckpointError: It is no stack of square blocks; or the scale is no column.
    """
    shape, scale = tuple(tensors[_R].shape), tuple(tensors[_SCALE].shape)
    if len(shape) != 4 or shape[2] != shape[3]:
        raise CheckpointError(f"{_R} has shape {shape}, not (m, n, b, b)")
    if len(scale) != 2 or scale[1] != 1:
        raise CheckpointError(f"{_SCALE} has shape {scale}, not (out, 1)")
    return {"factors": shape[0], "block_size": shape[2]}


def ours(
    found: Directory, spec: BOFT, tensors: Mapping[str, Tensor], weight: Weight
) -> dict[str, Tensor]:
    """``theta`` and ``magnitude``."""
    d = tensors[_R]
    return {
        "theta": cayley.skew_grad(d) / -2,
        "magnitude": tensors[_SCALE].squeeze(-1) - 1,
    }


def theirs(spec: BOFT, tensors: Mapping[str, Tensor], weight: Weight) -> dict[str, Tensor]:
    """``boft_R`` and ``boft_s``."""
    theta = oft.entries(tensors["theta"], spec)
    # Added to zero, an entry that was never trained has PEFT's sign.
    return {
        _R: 0 - cayley.skew(theta, spec.block_size),
        _SCALE: 1 + tensors["magnitude"].unsqueeze(-1),
    }


def config(specs: Mapping[str, BOFT], widths: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's fields.

    Raises:
        CheckpointError: A series, blocks that share parameters, or fields that differ between
            sites.
    """
    one = uniform(specs, "factors", "dropout")
    sizes = {spec.block_size for spec in specs.values()}
    numbers = {widths[fqn] // spec.block_size for fqn, spec in specs.items()}
    if len(sizes) > 1 and len(numbers) > 1:
        raise CheckpointError(
            f"block sizes {sorted(sizes)}: PEFT has one, or one number of blocks, for all layers."
        )
    for fqn, spec in specs.items():
        if not spec.exact:
            raise CheckpointError(
                f"{fqn}: PEFT's BOFT has the exact transform alone, not the series of order "
                f"{spec.order}: exact=True."
            )
        if spec.share_blocks:
            raise CheckpointError(f"{fqn}: PEFT's BOFT has no share_blocks=True.")
    return {
        "boft_block_num": numbers.pop() if len(sizes) > 1 else 0,
        "boft_block_size": 0 if len(sizes) > 1 else one.block_size,
        "boft_dropout": one.dropout,
        "boft_n_butterfly_factor": one.factors,
        "fan_in_fan_out": False,
    }
