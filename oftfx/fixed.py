"""The tensors that rotations keep but never train: made once, from weights or calibration."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from oftfx.capture import Model
from oftfx.errors import PlanError
from oftfx.plan import Plan, Site
from oftfx.progress import tracked
from oftfx.rotations import fixed as made
from oftfx.rotations import method_of
from oftfx.spec import LOFT
from oftfx.weights import Weights

if TYPE_CHECKING:
    from oftfx.calibrate import Calibration, Loss

Values: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""By the fqn of the site that holds the rotation, the tensors' values by name."""

Fixed: TypeAlias = Callable[[], Values]


@torch.no_grad()
def values(
    model: Model,
    plan: Plan,
    calibration: "Calibration | Iterable[Any] | None" = None,
    loss: "Loss | None" = None,
) -> Values:
    """Makes the tensors that a plan's rotations never train; one weight at a time is in floats.

    Raises:
        PlanError: A weight has no values or is not finite; or the directions of a site depend on
            the loss, and there is no calibration for it, or one that no site wants.
    """
    from oftfx.calibrate import Calibration, calibrate

    holders = [s for s in plan.sites if not s.shared and method_of(plan.spec_of(s)).FIXED]
    wanting = [site for site in holders if is_calibrated(plan, site)]
    if calibration is None and wanting:
        support = getattr(plan.spec_of(wanting[0]), "support", None)
        raise PlanError(
            f"{wanting[0].fqn}: support={support!r} follows the loss's gradient: pass batches to "
            "run, oftfx.adapt(model, spec, calibration=batches), or use support='principal', "
            "'random' or 'coordinate', which need none."
        )
    if calibration is not None and not wanting:
        raise PlanError(
            "calibration is given, but no site's directions depend on it: leave it out, or use "
            "oftfx.LOFT(support='skew')."
        )
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = calibrate(model, plan, calibration, loss)
    elif loss is not None:
        raise PlanError("loss is given, but no batches to run it on: pass calibration=batches.")

    weights = Weights(model)
    out: dict[str, Mapping[str, Tensor]] = {}
    for site in tracked(holders, "finding directions"):
        weights.like(site)  # a rotation on `meta` would lose what is made here
        if calibration is not None and site in wanting:
            out[site.fqn] = {"support": calibration.support(site, plan.spec_of(site))}
            continue
        readers = [other for other in plan.sites if other.rotation == site.fqn]
        spec, seed = plan.spec_of(site), plan.seed_of(site.rotation)
        out[site.fqn] = made(spec, site.in_features, seed, partial(weights.stacked, readers))
    return out


def is_calibrated(plan: Plan, site: Site) -> bool:
    """Whether a site's directions depend on the loss."""
    spec = plan.spec_of(site)
    return isinstance(spec, LOFT) and spec.calibrated
