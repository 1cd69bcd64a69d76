"""An adapter as LoRA, ``W + B·A``, for engines that serve nothing else unmerged.

A map of few directions, ``x ← x + (x·Pᵀ)·K·P`` (PSOFT, LOFT, HRA), is LoRA to the last digit:
``A = P`` and ``B = W·Pᵀ·Kᵀ``. What turns all directions (OFT, BOFT, GOFT) is not; of it, LoRA can
hold the part of the change ``W·Mᵀ − W`` along its top right singular vectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from oftfx.errors import CheckpointError
from oftfx.interop.peft.copied import write_copied
from oftfx.interop.peft.write import check_layer, files, header
from oftfx.modules import built
from oftfx.ops.factor import Factor
from oftfx.ops.subspace import SUBSPACE
from oftfx.plan import Plan
from oftfx.progress import tracked
from oftfx.rotations import method_of, output_shapes, supports
from oftfx.sites.embedding import KIND as EMBEDDING
from oftfx.table import table
from oftfx.weights import Weights


@dataclass(frozen=True)
class LoraSite:
    """What writing one site as LoRA cost.

    Attributes:
        fqn: The site.
        rank: Of its factors.
        error: ``‖ΔW − B·A‖_F / ‖ΔW‖_F``, with ΔW the change that the rotation makes to the weight;
            0 where LoRA is exact but for rounding.
    """

    fqn: str
    rank: int
    error: float


@dataclass(frozen=True)
class LoraReport:
    """What writing an adapter as LoRA cost, per site; ``str()`` is a table."""

    sites: tuple[LoraSite, ...]

    def __str__(self) -> str:
        rows = [(site.fqn, str(site.rank), f"{site.error:.1%}") for site in self.sites]
        return table(("site", "rank", "lost"), rows, right="rank lost")


@torch.no_grad()
def write_lora(
    plan: Plan,
    values: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    weights: Weights,
    rank: int | None,
    base: str | None,
) -> tuple[dict[str, bytes], LoraReport]:
    """The contents of a LoRA directory's files, and what they lack.

    Args:
        plan: What is adapted.
        values: The adapter's tensors, as [`save`][oftfx.save] names them.
        own: All tensors of the base by name.
        weights: Of the base; one at a time is in floats.
        rank: Of the factors; None for that of the map, where it has one.
        base: Where the base came from, for the reader's own use.

    Raises:
        CheckpointError: A map turns all directions and there is no rank; or a weight is no layer's.
        PlanError: A weight has no values, or cannot be made floats.
    """
    tensors, sites = {}, []
    for site in tracked(plan.sites, "factoring"):
        spec = plan.spec_of(site)
        outputs = output_shapes(spec, site.out_features)
        check_layer(site, spec, outputs)
        if site.kind == EMBEDDING:
            raise CheckpointError(
                f"{site.fqn} is an embedding, whose rows are rotated; as LoRA only matmuls are "
                "written: serve the merged model, or exclude it."
            )
        names = method_of(spec).shapes(spec, site.in_features)
        held = {name: values[f"{site.rotation}.{name}"] for name in names}
        factors = method_of(spec).factors(built(spec, held), spec)
        magnitude = values[f"{site.fqn}.magnitude"] if outputs else None
        a, b, error = factored(weights.floats(site), factors, rank, site.fqn, magnitude)
        tensors[f"{site.fqn}.lora_A.weight"] = a
        tensors[f"{site.fqn}.lora_B.weight"] = b
        sites.append(LoraSite(site.fqn, len(a), error))
    ranks = {site.fqn: site.rank for site in sites}
    usual = max(ranks.values())
    others = {fqn: r for fqn, r in ranks.items() if r != usual}
    copied, fields = write_copied(plan, "LORA", values, own)
    config = (
        header(plan, own, base)
        | fields
        | {
            "alpha_pattern": others,  # alpha = r everywhere: B·A as it is
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "lora_alpha": usual,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": usual,
            "rank_pattern": others,
            "use_dora": False,
            "use_rslora": False,
        }
    )
    return files(tensors | copied, config), LoraReport(tuple(sites))


def factored(
    weight: Tensor,
    factors: tuple[Factor, ...],
    rank: int | None,
    fqn: str = "this site",
    magnitude: Tensor | None = None,
) -> tuple[Tensor, Tensor, float]:
    """``(A, B, error)``, A (r, in) and B (out, r), of the change a map makes to a weight.

    Args:
        weight: (out, in), float32 or float64.
        factors: Of the map, in the order x meets them.
        rank: r, or None for that of the map.
        fqn: For messages.
        magnitude: (out,), what each output is scaled by besides, less one.

    Raises:
        CheckpointError: The map has no rank of its own, and none is given.
    """
    if len(factors) == 1 and factors[0].op is SUBSPACE and magnitude is None:
        support, kernel = (operand.to(weight) for operand in factors[0].operands)
        if rank is None or rank >= len(support):
            return support, weight @ support.mT @ kernel.mT, 0.0
    elif rank is None:
        raise CheckpointError(
            f"{fqn}: its rotation turns all directions, which LoRA cannot: give the rank= of its "
            "best approximation, or serve the merged model, which is exact."
        )
    folded = weight
    for factor in reversed(factors):
        folded = factor.transposed()(folded)
    if magnitude is not None:
        folded = (1 + magnitude.to(folded)).unsqueeze(-1) * folded
    change = folded - weight
    rank = min(rank or 0, *weight.shape)
    a = supports.principal(change, rank, torch.Generator().manual_seed(0))
    b = change @ a.mT
    whole = change.norm()
    return a, b, float((change - b @ a).norm() / whole) if whole else 0.0
