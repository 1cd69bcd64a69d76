"""Calibration: the directions in which turning a layer's input changes the loss most.

A few batches run forward and backward through the frozen model; probes (`probe.py`) show what
passes at every site to its sketch (`rotations/sketches.py`).
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import optree
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from oftfx.capture import Model, arguments, unwrap
from oftfx.errors import PlanError
from oftfx.fixed import is_calibrated
from oftfx.plan import Plan, Site, plan
from oftfx.probe import ROWS, Probe, probed, training
from oftfx.progress import tracked
from oftfx.regions import differentiable
from oftfx.rotations import num_trainable, supports
from oftfx.rotations.sketches import PASSES, PROBES, Gradient, Sketch, Skew
from oftfx.spec import LOFT, Spec
from oftfx.spec.rules import exactly
from oftfx.table import listed, table
from oftfx.weights import Weights

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""From a model's output and the batch it came from to a scalar."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What [`calibrate`][oftfx.calibrate] found; ``str()`` is a table.

    Attributes:
        plan: The plan it was made for.
        supports: By the fqn of the site that holds the rotation, (rank, width) orthonormal
            directions, the most telling first.
        energies: By fqn, (rank,) the squared singular value of each direction, float64 on the CPU.
        totals: By fqn, the sum over all directions, estimated.
    """

    plan: Plan
    supports: Mapping[str, Tensor]
    energies: Mapping[str, Tensor]
    totals: Mapping[str, float]

    def captured(self, fqn: str, rank: int | None = None) -> float:
        """The share of a site's spectrum (sum of squares) that its rank, or another, captures."""
        return float(self.energies[fqn][:rank].sum()) / self.totals[fqn]

    def within(self, num_trainable: int) -> Plan:
        """The plan with ranks that capture most with at most this many trainable numbers.

        Every site keeps at least one plane; no rank exceeds the one that was calibrated.

        Raises:
            PlanError: The budget is less than one plane a site takes.
        """
        ranks = _allot(self, num_trainable)
        sites, overrides = [], dict(self.plan.spec.overrides)
        for site in self.plan.sites:
            rank = ranks.get(site.rotation)
            if rank is not None:
                overrides[exactly(site.fqn)] = {"rank": rank}
                if not site.shared:
                    site = replace(site, num_trainable=_cost(self.plan, site, rank))
            sites.append(site)
        spec = replace(self.plan.spec, overrides=overrides)
        return replace(self.plan, spec=spec, sites=tuple(sites))

    def support(self, site: Site, spec: Spec) -> Tensor:
        """The directions for a site under a spec of the same or a smaller rank.

        Raises:
            PlanError: They were not calibrated.
        """
        found = self.supports.get(site.fqn)
        assert isinstance(spec, LOFT)
        if found is None or found.shape[1] != site.in_features:
            raise PlanError(f"{site.fqn}: the calibration is another plan's; calibrate this one.")
        made: Any = self.plan.spec.at(site.fqn)
        if made.support != spec.support or len(found) < spec.rank:
            raise PlanError(
                f"{site.fqn}: calibrated for support={made.support!r} and rank={len(found)}, not "
                f"for support={spec.support!r} and rank={spec.rank}: calibrate with this spec."
            )
        return found[: spec.rank]

    def __str__(self) -> str:
        rows = [
            (fqn, f"{found.shape[1]}", f"{len(found)}", f"{self.captured(fqn):.1%}")
            for fqn, found in self.supports.items()
        ]
        header = ("site", "width", "rank", "captured")
        return table(header, rows, right="width rank captured")


def calibrate(
    model: Model,
    spec: Spec | Plan,
    batches: Iterable[Any],
    loss: Loss | None = None,
    example_inputs: Any = None,
    capture: Literal["graph", "modules"] = "graph",
) -> Calibration:
    """Finds the directions that ``LOFT(support="skew")`` and ``"gradient"`` turn.

    Runs every batch forward and backward three times, in train mode (the same dropout each time),
    with everything frozen, and leaves the model, its modes, flags, gradients, buffers and the
    random state as they were, also when it fails.

    Extra memory, beyond what a training step of the adapted model holds, of which the sites'
    inputs are a part: see [`sketch_bytes`][oftfx.calibrate.sketch_bytes].

    Args:
        model: An nn.Module, GraphModule or ExportedProgram, not adapted by this spec yet.
        spec: What to adapt, or its plan.
        batches: Each a tensor, a tuple of positional or a dict of keyword arguments. A few are
            enough (4 in the authors' runs). Tensors are moved to the model's device.
        loss: ``loss(output, batch)``, a scalar. None: the output's ``loss``, or the output itself
            where it is a scalar.
        example_inputs: As for [`plan`][oftfx.plan].
        capture: As for [`plan`][oftfx.plan].

    Raises:
        CaptureError, SpecError, ValueError: As [`plan`][oftfx.plan].
        PlanError: No site is calibrated; there is no batch or no loss; or a site gets no gradient,
            or none that is finite.
    """
    inner = unwrap(model)
    found = spec if isinstance(spec, Plan) else plan(inner, spec, example_inputs, capture)
    wanting = [site for site in found.sites if not site.shared and is_calibrated(found, site)]
    if not wanting:
        raise PlanError("no site's directions depend on the loss: there is nothing to calibrate.")
    given = list(batches)
    if not given:
        raise PlanError("calibration: there is no batch; pass at least one.")
    running: nn.Module = (
        differentiable(inner).module() if isinstance(inner, ExportedProgram) else inner
    )
    weights = Weights(running)
    sketches = {site.fqn: _sketch(found, site, weights) for site in wanting}
    probes = [
        (site, Probe(sketches[site.rotation], site.fqn, site.layout))
        for site in found.sites
        if site.rotation in sketches
    ]
    with training(running), probed(running, found, probes):
        _run(running, given, loss, sketches)
    results = {fqn: sketch.result() for fqn, sketch in sketches.items()}
    return Calibration(
        found,
        supports={fqn: result.support for fqn, result in results.items()},
        energies={fqn: result.energies for fqn, result in results.items()},
        totals={fqn: result.total for fqn, result in results.items()},
    )


def sketch_bytes(plan: Plan) -> int:
    """What calibrating a plan holds besides a training step's own tensors and the result, at most.

    Per rotation of width d and rank r, in columns ``l ≤ r + 16``: ``2·d·l`` numbers for "skew" and
    ``(2·d + out)·l`` for "gradient". For one rotation at a time three times that again, while its
    basis is made, or 4096 rows of its input, of its gradient and of a product with the basis; or,
    where a weight is used without a layer, that weight and its gradient. The numbers are float32;
    in a float64 model they take twice as much.
    """
    held, working = 0, 0
    for site in plan.sites:
        if is_calibrated(plan, site):
            width, out, columns = site.in_features, site.out_features, _columns(plan, site)
            outs = sum(s.out_features for s in plan.sites if s.rotation == site.rotation)
            skew = getattr(plan.spec_of(site), "support", None) == "skew"
            sketch = columns * (2 * width + (0 if skew else outs))
            held += 0 if site.shared else sketch
            rows = ROWS * (width + max(width, out) + columns)
            weight = 3 * width * out if site.kind == "functional" else 0
            working = max(working, 3 * sketch, rows, weight)
    return 4 * (held + working)


def _sketch(plan: Plan, site: Site, weights: Weights) -> Sketch:
    like, spec = weights.like(site), plan.spec_of(site)
    assert isinstance(spec, LOFT)
    width, seed = site.in_features, plan.seed_of(site.rotation)
    if spec.support == "skew":
        return Skew(width, spec.rank, seed, like)
    readers = [other for other in plan.sites if other.rotation == site.fqn]
    outs = {other.fqn: other.out_features for other in readers}
    return Gradient(width, spec.rank, seed, like, outs)


def _run(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss | None,
    sketches: Mapping[str, Sketch],
) -> None:
    devices = (p.device for p in model.parameters() if p.device.type != "meta")
    device = next(devices, torch.device("cpu"))
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    steps = iter(tracked([*batches] * PASSES, "calibrating"))
    # Compiled code may be of a time before the probes, and is not worth compiling for them.
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        for number in range(PASSES):
            for sketch in sketches.values():
                sketch.begin(number)
            with torch.random.fork_rng(cuda):  # every pass sees the same dropout
                for batch in itertools.islice(steps, len(batches)):
                    moved = optree.tree_map(partial(_moved, device=device), _plain(batch))
                    args, kwargs = arguments(moved)
                    _scalar(model(*args, **kwargs), moved, loss).backward()
            _check_images(sketches)
    for _ in steps:  # lets the bar end
        pass


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def _moved(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def _scalar(output: Any, batch: Any, loss: Loss | None) -> Tensor:
    """The loss of one batch, checked."""
    value: Any
    if loss is not None:
        value = loss(output, batch)
    elif isinstance(output, Mapping):
        value = output.get("loss")
    else:
        value = getattr(output, "loss", output)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise PlanError(
            f"calibration: the loss is {what[:60]}, no scalar: put labels into the batches, so "
            "that the output has a loss, or pass loss=lambda output, batch: …"
        )
    if not torch.isfinite(value).all():
        raise PlanError(f"calibration: a batch's loss is {float(value)}: leave that batch out.")
    if not value.requires_grad:
        raise PlanError(
            "calibration: the loss depends on no site: the model detaches its output, or runs "
            "without gradients."
        )
    return value


def _check_images(sketches: Mapping[str, Sketch]) -> None:
    silent = [fqn for fqn, s in sketches.items() if not any(i.any() for i in s.images())]
    broken = [fqn for fqn, s in sketches.items() if not all(i.isfinite().all() for i in s.images())]
    for fqns, fault in ((broken, "a gradient that is not finite"), (silent, "no gradient")):
        if fqns:
            raise PlanError(
                f"calibration: {fault} came to {len(fqns)} of {len(sketches)} rotations "
                f"({listed(fqns)}): pass batches and a loss that reach them, or exclude them."
            )


def _allot(calibration: Calibration, budget: int) -> dict[str, int]:
    """Ranks under a budget: always the plane next that captures most per trainable number."""
    plan = calibration.plan
    holders = {site.fqn: site for site in plan.sites if site.fqn in calibration.energies}
    ranks = dict.fromkeys(holders, 2)
    others = sum(site.num_trainable for site in plan.sites if site.fqn not in holders)
    left = budget - others - sum(_cost(plan, site, 2) for site in holders.values())
    if left < 0:
        raise PlanError(
            f"a budget of {budget:,} trainable numbers is less than one plane a site takes: "
            f"{budget - left:,}. Raise it, or exclude sites."
        )
    heap = [step for fqn, site in holders.items() if (step := _step(calibration, site, 2))]
    heapq.heapify(heap)
    while heap:
        _, fqn, cost = heapq.heappop(heap)
        if cost <= left:
            left -= cost
            ranks[fqn] += 2
            if step := _step(calibration, holders[fqn], ranks[fqn]):
                heapq.heappush(heap, step)
    return ranks


def _step(calibration: Calibration, site: Site, rank: int) -> tuple[float, str, int] | None:
    """One plane more at a site: minus what it captures per number, and what it costs."""
    energies = calibration.energies[site.fqn]
    if rank + 2 > len(energies):
        return None
    cost = _cost(calibration.plan, site, rank + 2) - _cost(calibration.plan, site, rank)
    return -float(energies[rank : rank + 2].sum()) / cost, site.fqn, cost


def _cost(plan: Plan, site: Site, rank: int) -> int:
    return num_trainable(replace(plan.spec_of(site), rank=rank), site.in_features)  # type: ignore[call-arg]


def _columns(plan: Plan, site: Site) -> int:
    """Columns of a site's sketch, the probes included."""
    rank: int = getattr(plan.spec_of(site), "rank", 0)
    return min(site.in_features, rank + supports.OVERSAMPLING + PROBES)
