"""How far each rotation has turned, and how orthogonal it still is."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils.weak import WeakIdKeyDictionary

from oftfx import inserted, modules
from oftfx.capture import Model, unwrap
from oftfx.errors import OftfxWarning
from oftfx.host import host_of
from oftfx.ops.factor import SCALE
from oftfx.rotations import is_free, method_of, scaled
from oftfx.spec import Spec
from oftfx.spread import whole
from oftfx.table import listed, table

_WARNED: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class Health:
    """Per site, the worst of its blocks; tensors stay on the device of the parameters.

    A rotation by θ in a plane is the Cayley transform of a Q of ‖Q‖₂ = tan(θ/2), by which methods
    without a Q report how far they have turned.

    Attributes:
        fqns: The sites.
        norm: (sites,) ‖Q‖₂, an upper bound within 1 %. The series converges below 1 only.
        orthogonality_error: (sites,) ‖RᵀR − I‖₂, by the error law.
        thetas: The first parameter of each site, by which `warn` knows it again.
        series: Whether the rotation comes from a series, which needs ‖Q‖₂ < 1.
    """

    fqns: tuple[str, ...]
    norm: Tensor
    orthogonality_error: Tensor
    thetas: tuple[Tensor, ...]
    series: tuple[bool, ...]

    @property
    def angle(self) -> Tensor:
        """(sites,) radians, the largest angle by which the rotation turns a plane: 2·arctan‖Q‖₂."""
        return 2 * torch.arctan(self.norm)

    @property
    def diverged(self) -> Tensor:
        """(sites,) bool, whether the map is no rotation: no number, or a series at ‖Q‖₂ ≥ 1."""
        series = torch.tensor(self.series, device=self.norm.device)
        return self.norm.isnan() | (series & (self.norm >= 1))

    def warn(self) -> None:
        """Warns once per site that diverged: not finite, or a series with ‖Q‖₂ ≥ 1.

        Waits for the device.
        """
        reached = self.diverged.tolist()
        new = [i for i, outside in enumerate(reached) if outside and self.thetas[i] not in _WARNED]
        if not new:
            return
        for i in new:
            _WARNED[self.thetas[i]] = True
        names = listed([self.fqns[i] for i in new])
        warnings.warn(
            f"‖Q‖ ≥ 1 at {len(new)} sites ({names}): the Cayley–Neumann series diverges there and "
            'the maps are no rotations. Lower the learning rate, or use guard="rescale", '
            'guard="exact" or exact=True.'
            if any(self.series[i] for i in new)
            else f"{len(new)} rotations are not finite ({names}): lower the learning rate.",
            OftfxWarning,
            stacklevel=2,
        )

    def __str__(self) -> str:
        columns = (self.norm, self.angle.rad2deg(), self.orthogonality_error)
        values = zip(*(column.tolist() for column in columns), strict=True)
        rows = [
            (fqn, f"{norm:.4f}", f"{angle:.2f}", f"{error:.1e}")
            for fqn, (norm, angle, error) in zip(self.fqns, values, strict=True)
        ]
        header = ("site", "‖Q‖", "degrees", "orthogonality")
        return table(header, rows, right="‖Q‖ degrees orthogonality")


@torch.no_grad()
def health(model: Model, name: str | None = None) -> Health:
    """The health of every rotation of a model at its scale, without waiting for the device.

    Args:
        model: An adapted nn.Module, GraphModule or ExportedProgram.
        name: One adapter, in use or not; None for those in use.

    Raises:
        PlanError: The model has no adapter (or none of this name, or none in use).
    """
    found = rotations_of(unwrap(model), name)
    norms: list[Tensor] = [torch.empty(0)] * len(found)
    errors = list(norms)
    for spec, stacked, members in batches(found):
        known = scaled(stacked, spec, found[members[0]].scale)
        norm, error = method_of(spec).health(known, spec)
        for i, n, e in zip(members, norm.float(), error.float(), strict=True):
            norms[i], errors[i] = n, e
    device = norms[0].device
    return Health(
        fqns=tuple(rotation.site for rotation in found),
        norm=torch.stack([n.to(device) for n in norms]),
        orthogonality_error=torch.stack([e.to(device) for e in errors]),
        thetas=tuple(next(iter(rotation.tensors.values())) for rotation in found),
        series=tuple(_by_series(rotation.spec) for rotation in found),
    )


class Held(NamedTuple):
    """A rotation of a model of any kind: its site, its parameters by name, its spec, its scale."""

    site: str
    tensors: dict[str, Tensor]
    spec: Spec
    scale: float = 1.0


def rotations_of(model: nn.Module | ExportedProgram, name: str | None = None) -> list[Held]:
    """Every rotation of a model, of one adapter or of those in use.

    Raises:
        PlanError: There is none.
    """
    if isinstance(model, (fx.GraphModule, ExportedProgram)):
        host = host_of(model)
        turning = (r for r in inserted.inserted(host) if r.factor.op is not SCALE)
        once = {r.parameters: r for r in turning if name in (None, r.adapter)}
        plans = inserted.plans(host)
        found = [Held(r.site, r.tensors(host), inserted.spec_of(r, plans)) for r in once.values()]
    else:
        found = [
            Held(fqn, dict(rotation.tensors()), rotation.spec, rotation.scaling)
            for fqn, rotation in modules.rotations(model, name)
            if rotation.enabled or name is not None
        ]
    if not found:
        raise modules.absent(model, name)
    return found


def batches(found: list[Held]) -> Iterator[tuple[Spec, dict[str, Tensor], list[int]]]:
    """Rotations of one spec, shape and scale: their stacked parameters, and their places."""
    alike: dict[Any, list[int]] = {}
    for i, (_, tensors, spec, scale) in enumerate(found):
        layout = tuple((name, t.shape, t.device) for name, t in tensors.items())
        alike.setdefault((spec, scale, layout), []).append(i)
    for (spec, _, layout), members in alike.items():
        wide = torch.promote_types(spec.dtype, torch.float32)
        stacked = {
            name: torch.stack([whole(found[i].tensors[name]) for i in members]).to(wide)
            for name, *_ in layout
        }
        yield spec, stacked, members


def _by_series(spec: Spec) -> bool:
    """Whether a rotation comes from the Cayley–Neumann series wherever its parameters are."""
    exact = getattr(spec, "exact", False) or getattr(spec, "guard", None) == "exact"
    return hasattr(spec, "order") and not exact and not is_free(spec)
