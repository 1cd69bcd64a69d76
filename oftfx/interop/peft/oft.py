"""PEFT's OFT: ``oft_R.weight``, (n, b(b−1)/2), the skew parameters of each block.

What its number of terms t means depends on the version that computes with it. From 0.18 on, t ≥ 4
is ``I + 2Q + … + 2Q^{t−2} + Q^{t−1}``, the series of order t − 2, and t = 3 is computed as t = 4.
Before, it ended with ``2Q^{t−1}``, which is our ``doubled`` of order t − 2.
``use_cayley_neumann=False`` is ``(I − Q)(I + Q)⁻¹``: our exact transform of −Q.
"""

import math
from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor

from oftfx.errors import CheckpointError
from oftfx.interop.peft.directory import CONFIG, Directory
from oftfx.interop.peft.uniform import uniform
from oftfx.rotations import oft, projection_of
from oftfx.rotations.supports import Weight
from oftfx.spec import COFT, OFT

_R = "oft_R.weight"
SUFFIXES: tuple[str, ...] = (_R,)
EMBEDDED: Mapping[str, str] = {_R: "oft_embedding_R.weight"}
FIELDS = frozenset(
    {
        "block_share",
        "coft",
        "eps",
        "fan_in_fan_out",
        "module_dropout",
        "num_cayley_neumann_terms",
        "oft_block_size",
        "r",
        "use_cayley_neumann",
    }
)
OUTPUTS: tuple[str, ...] = ()


def fields(found: Directory) -> dict[str, Any]:
    """Order, block share and dropout.

    Raises:
        CheckpointError: The number of terms stands for no order of the series.
    """
    if found.value("coft", False, bool):
        # PEFT projects the parameters whenever it computes, as `ours` does once.
        special: dict[str, Any] = {"method": COFT, "eps": found.value("eps", 6e-5, (int, float))}
    else:
        special = {"method": OFT}
    return {
        **special,
        **series(found),
        "share_blocks": found.value("block_share", False, bool),
        "dropout": found.value("module_dropout", 0.0, (int, float)),
    }


def series(found: Directory) -> dict[str, Any]:
    """The order that a number of terms stands for in the version that wrote it."""
    if not found.value("use_cayley_neumann", True, bool):
        return {"exact": True}
    terms = found.value("num_cayley_neumann_terms", 5, int)
    where = found.path / CONFIG
    if terms < 3:
        raise CheckpointError(
            f"{where}: num_cayley_neumann_terms={terms} is I{' + 2Q' * (terms == 2)}, no series "
            "of an order ≥ 1."
        )
    if found.version < (0, 18):
        return {"order": terms - 2, "doubled": True}
    return {"order": max(terms - 2, 2)}


def fields_at(found: Directory, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The block size, which a layer's tensor tells."""
    theta = tensors[_R]
    if theta.dim() != 2:
        raise CheckpointError(f"oft_R.weight has shape {tuple(theta.shape)}, not (n, b(b−1)/2)")
    b = (1 + math.isqrt(1 + 8 * theta.shape[1])) // 2
    if b * (b - 1) // 2 != theta.shape[1] or b < 2:
        raise CheckpointError(f"oft_R.weight has {theta.shape[1]} columns, which is no b(b−1)/2")
    return {"block_size": b}


def ours(
    found: Directory, spec: OFT, tensors: Mapping[str, Tensor], weight: Weight
) -> dict[str, Tensor]:
    """``theta``."""
    values = {"theta": _signed(spec, tensors[_R])}
    projection = projection_of(spec)
    return projection(values, spec) if projection else values


def theirs(spec: OFT, tensors: Mapping[str, Tensor], weight: Weight) -> dict[str, Tensor]:
    """``oft_R.weight``."""
    return {_R: _signed(spec, oft.entries(tensors["theta"], spec))}


def config(specs: Mapping[str, OFT], widths: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's fields.

    Raises:
        CheckpointError: A guard, an order PEFT has no number of terms for, fields that differ
            between sites, or block sizes that no requested one leads to.
    """
    one = uniform(specs, "order", "exact", "share_blocks", "dropout", "eps")
    for fqn, spec in specs.items():
        if spec.doubled:
            raise CheckpointError(
                f"{fqn}: doubled=True is the series of PEFT 0.16 and 0.17, which no later one has."
            )
    return {
        "block_share": one.share_blocks,
        "coft": isinstance(one, COFT),
        "eps": getattr(one, "eps", 6e-5),
        "fan_in_fan_out": False,
        "module_dropout": one.dropout,
        **_requested({(widths[fqn], spec.block_size) for fqn, spec in specs.items()}),
        **series_fields(one),
    }


def series_fields(spec: oft.Blocks) -> dict[str, Any]:
    """PEFT's fields for a series or the exact transform.

    Raises:
        CheckpointError: It has no number of terms for the order.
    """
    if not spec.exact and spec.order < 2:
        raise CheckpointError(f"PEFT has no number of terms for order={spec.order}; it has ≥ 2.")
    return {
        "num_cayley_neumann_terms": 5 if spec.exact else spec.order + 2,
        "use_cayley_neumann": not spec.exact,
    }


def adjusted(width: int, requested: int) -> int:
    """The block size that PEFT takes instead of one that does not divide a layer's input width.

    The nearest divisor, of two equally near ones the smaller.
    """
    if requested >= width:
        return width
    divisors = (b for b in range(1, width + 1) if width % b == 0)
    return min(divisors, key=lambda b: (abs(b - requested), b))


def _requested(sites: Set[tuple[int, int]]) -> dict[str, Any]:
    """A block size that PEFT adjusts, at each site's width, to the one that the site has.

    Or a number of blocks that all sites have.
    """
    sizes = sorted({b for _, b in sites})
    for requested in (*sizes, *range(2, sizes[-1] + 1)):
        if all(adjusted(width, requested) == b for width, b in sites):
            return {"oft_block_size": requested, "r": 0}
    numbers = {width // b for width, b in sites}
    if len(numbers) == 1:
        return {"oft_block_size": 0, "r": numbers.pop()}
    raise CheckpointError(
        f"block sizes {sizes}: PEFT has one, or one number of blocks, for all layers."
    )


def _signed(spec: OFT, theta: Tensor) -> Tensor:
    return -theta if spec.exact else theta
