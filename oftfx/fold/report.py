"""What merging cost."""

import warnings
from dataclasses import dataclass

from oftfx.errors import OftfxWarning
from oftfx.table import table


@dataclass(frozen=True)
class MergedSite:
    """What folding one site cost; the errors are relative (2-norm).

    Attributes:
        fqn: The site.
        output_error: Change of the output on random inputs, merged against unmerged.
        orthogonality_error: ‖RᵀR − I‖₂ of the worst factor folded in.
        rounding_error: Distance of the stored weight from the exactly folded one.
        untied: Whether the weight was tied and got a tensor of its own.
        survived: Of a requantised weight, the share of the adaptation that is still there:
            ``⟨V − W, F − W⟩ / ‖F − W‖²`` with W the weight before, F the exactly folded one and V
            the stored one, all as floats. 1 when nothing was rounded away, 0 when everything was;
            rounding may push it beyond either. NaN where nothing was adapted, F = W.
    """

    fqn: str
    output_error: float
    orthogonality_error: float
    rounding_error: float
    untied: bool = False
    survived: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """What merging cost, per site; ``str()`` is a table.

    Attributes:
        sites: What was folded.
        adapters: Those that were folded, in the order x met them.
    """

    sites: tuple[MergedSite, ...]
    adapters: tuple[str, ...] = ()

    def __str__(self) -> str:
        requantised = any(site.survived is not None for site in self.sites)
        rows = [
            (
                site.fqn,
                f"{site.output_error:.1e}",
                f"{site.orthogonality_error:.1e}",
                f"{site.rounding_error:.1e}",
                *([] if not requantised else [percent(site.survived)]),
                "untied" if site.untied else "",
            )
            for site in self.sites
        ]
        survived = ["survived"] if requantised else []
        header = ("site", "output", "orthogonality", "rounding", *survived, "")
        shown = table(header, rows, right="output orthogonality rounding survived")
        if len(self.adapters) < 2:
            return shown
        return f"{shown}\n\nfolded, in the order x met them: {', '.join(self.adapters)}"


def percent(share: float | None) -> str:
    """A share as text; nothing for None."""
    return "" if share is None else f"{share:.0%}"


def warn_of_loss(costs: list[MergedSite]) -> None:
    """Tells where requantising took most of the adaptation away."""
    lost = [site for site in costs if site.survived is not None and site.survived < 0.5]
    if lost:
        worst = min(lost, key=lambda site: site.survived or 0.0)
        warnings.warn(
            f"requantising rounded most of the adaptation away at {len(lost)} of {len(costs)} "
            f"sites ({worst.fqn}: {percent(worst.survived)} is left). The merged model is close "
            "to the base; keep the adapter beside it, or merge to floats: oftfx.merge(model).",
            OftfxWarning,
            stacklevel=4,
        )
