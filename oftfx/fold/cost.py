"""What folding a weight costs, measured on the device and read off it once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from oftfx.fold.report import MergedSite
from oftfx.fold.weight import Fold, read
from oftfx.ops.factor import Factor, defects


class Cost(NamedTuple):
    """The numbers of one `MergedSite`, still on the device.

    Attributes:
        fqn: The site.
        values: (2,) the output's and the rounding error; (3,) with the share that survived
            requantising.
        factors: What was folded in.
        untied: As in `MergedSite`.
    """

    fqn: str
    values: Tensor
    factors: Sequence[Factor]
    untied: bool


def cost(fold: Fold, stored: Tensor, untied: bool = False, requantised: bool = False) -> Cost:
    """What storing a weight cost, on 16 random inputs; does not wait for the device."""
    generator = torch.Generator(fold.weight.device).manual_seed(0)
    width = fold.weight.shape[-1 if fold.out_in else -2]
    x = torch.randn(16, width, generator=generator, device=fold.weight.device)
    x = rotated = x.to(fold.weight.dtype)
    for factor in fold.factors:
        rotated = factor(rotated)
    # Exact beside what is stored: 16 bits are rounded from float32, all else from float64.
    exactly = torch.float32 if fold.dtype.itemsize < 4 else torch.float64
    exactly = torch.promote_types(fold.wide(), exactly)
    sums = torch.zeros(6, dtype=torch.float64, device=x.device)
    for before, after, which in fold.blocks(stored):
        exact = fold.turned(before, exactly, which)
        unmerged = fold.scaled(rotated @ before.mT, which).double()
        merged = (x @ after.to(x.dtype).mT).double()
        parts = [_square(merged - unmerged), _square(unmerged)]
        parts += [_square(exact - after), _square(exact)]
        if requantised:
            change = exact - before
            parts += [((after - before) * change).sum(dtype=torch.float64), _square(change)]
        sums[: len(parts)] += torch.stack(parts)
    output, rounding = (sums[:4:2] / sums[1:4:2].clamp_min(1e-300)).sqrt()
    survived = [sums[4] / sums[5]] if requantised else []
    return Cost(fold.fqn, torch.stack([output, rounding, *survived]), fold.factors, untied)


def settled(costs: Sequence[Cost]) -> list[MergedSite]:
    """The numbers, read off the device at once; the factors' defects found together."""
    found = iter(defects([factor for each in costs for factor in each.factors]))
    pending = [
        torch.cat([torch.stack([next(found) for _ in each.factors]).amax(0, True), each.values])
        for each in costs
    ]
    return [
        MergedSite(each.fqn, output, defect, rounding, each.untied, *survived)
        for each, (defect, output, rounding, *survived) in zip(costs, read(pending), strict=True)
    ]


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()
