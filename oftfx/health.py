"""How far each rotation has turned, and how orthogonal it still is."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils.weak import WeakIdKeyDictionary

from oftfx import insert, modules
from oftfx.capture import Model, unwrap
from oftfx.errors import OftfxWarning, PlanError
from oftfx.host import host_of
from oftfx.rotations import method_of
from oftfx.spec import Spec
from oftfx.table import table

_WARNED: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class Health:
    """Per site, the worst of its blocks; tensors stay on the device of the parameters.

    Attributes:
        fqns: The sites.
        norm: (sites,) ‖Q‖₂, an upper bound within 1 %. The series converges below 1 only.
        orthogonality_error: (sites,) ‖RᵀR − I‖₂, by the error law.
        thetas: The first parameter of each site, by which `warn` knows it again.
    """

    fqns: tuple[str, ...]
    norm: Tensor
    orthogonality_error: Tensor
    thetas: tuple[Tensor, ...]

    @property
    def angle(self) -> Tensor:
        """(sites,) radians, the largest angle by which the rotation turns a plane: 2·arctan‖Q‖₂."""
        return 2 * torch.arctan(self.norm)

    def warn(self) -> None:
        """Warns once per site whose ‖Q‖₂ has reached 1. Waits for the device."""
        reached = (~(self.norm < 1)).tolist()  # NaN, after a divergence, counts as well
        new = [i for i, outside in enumerate(reached) if outside and self.thetas[i] not in _WARNED]
        if not new:
            return
        for i in new:
            _WARNED[self.thetas[i]] = True
        names = ", ".join(self.fqns[i] for i in new[:8]) + (", …" if len(new) > 8 else "")
        warnings.warn(
            f"‖Q‖ ≥ 1 at {len(new)} sites ({names}): the Cayley–Neumann series diverges there and "
            'the maps are no rotations. Lower the learning rate, or use guard="rescale", '
            'guard="exact" or exact=True.',
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
    """The health of every rotation of a model, without waiting for the device.

    Args:
        model: An adapted nn.Module, GraphModule or ExportedProgram.
        name: One adapter; None for all.

    Raises:
        PlanError: The model has no adapter (or none of this name).
    """
    found = _rotations(unwrap(model), name)
    if not found:
        raise PlanError(f"{type(model).__name__} has no adapter{f' {name!r}' if name else ''}.")
    batches: dict[Any, list[int]] = {}
    for i, (_, tensors, spec) in enumerate(found):
        layout = tuple((name, t.shape, t.device) for name, t in tensors.items())
        batches.setdefault((spec, layout), []).append(i)
    norms: list[Tensor] = [torch.empty(0)] * len(found)
    errors = list(norms)
    for (spec, layout), members in batches.items():
        wide = torch.promote_types(spec.dtype, torch.float32)
        stacked = {
            name: torch.stack([found[i][1][name] for i in members]).to(wide) for name, *_ in layout
        }
        norm, error = method_of(spec).health(stacked, spec)
        for i, n, e in zip(members, norm.float(), error.float(), strict=True):
            norms[i], errors[i] = n, e
    device = norms[0].device
    return Health(
        fqns=tuple(fqn for fqn, _, _ in found),
        norm=torch.stack([n.to(device) for n in norms]),
        orthogonality_error=torch.stack([e.to(device) for e in errors]),
        thetas=tuple(next(iter(tensors.values())) for _, tensors, _ in found),
    )


def _rotations(
    model: nn.Module | ExportedProgram, name: str | None
) -> list[tuple[str, dict[str, Tensor], Spec]]:
    """Site, parameters by name, and spec of every rotation."""
    if not isinstance(model, (fx.GraphModule, ExportedProgram)):
        found = modules.rotations(model, name)
        return [(fqn, dict(rotation.named_parameters()), rotation.spec) for fqn, rotation in found]
    host = host_of(model)
    once = {r.parameters: r for r in insert.inserted(host) if name in (None, r.adapter)}
    return [(r.site, r.tensors(host), insert.spec_of(host, r)) for r in once.values()]
