"""What folding a weight costs, measured on the device and read off it once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from oftfx.fold.report import MergedSite
from oftfx.fold.weight import Fold


class Cost(NamedTuple):
    """The numbers of one `MergedSite`, still on the device.

    Attributes:
        fqn: The site.
        values: (3,) the output's, the orthogonality and the rounding error; (4,) with the share
            that survived requantising.
        untied: As in `MergedSite`.
    """

    fqn: str
    values: Tensor
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
    for before, after in fold.blocks(stored):
        exact = fold.turned(before, exactly)
        unmerged = (rotated @ before.mT).double()
        merged = (x @ after.to(x.dtype).mT).double()
        parts = [_square(merged - unmerged), _square(unmerged)]
        parts += [_square(exact - after), _square(exact)]
        if requantised:
            change = exact - before
            parts += [((after - before) * change).sum(dtype=torch.float64), _square(change)]
        sums[: len(parts)] += torch.stack(parts)
    output, rounding = (sums[:4:2] / sums[1:4:2].clamp_min(1e-300)).sqrt()
    defect = torch.stack([factor.defect().double() for factor in fold.factors]).max()
    survived = [sums[4] / sums[5]] if requantised else []
    return Cost(fold.fqn, torch.stack([output, defect, rounding, *survived]), untied)


def settled(costs: Sequence[Cost]) -> list[MergedSite]:
    """The numbers, read off each device at once."""
    by_device: dict[torch.device, list[Cost]] = {}
    for each in costs:
        by_device.setdefault(each.values.device, []).append(each)
    read = {}
    for members in by_device.values():
        flat = torch.cat([each.values for each in members]).tolist()
        for each in members:
            read[each.fqn], flat = flat[: len(each.values)], flat[len(each.values) :]
    return [
        MergedSite(each.fqn, output, defect, rounding, each.untied, *survived)
        for each in costs
        for output, defect, rounding, *survived in [read[each.fqn]]
    ]


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()
