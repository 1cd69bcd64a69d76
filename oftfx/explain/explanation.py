"""What `explain` finds, and its table."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oftfx.explain.layer import LayerGraph
from oftfx.files import replacing
from oftfx.table import compact, counted, shape_of, table

WHOLE = ("graphs", "rotations", "cores")
"""Which of the backend's counts are of what it was given; the others are of what it did."""


@dataclass(frozen=True)
class ExplainedSite:
    """One adapted weight.

    Attributes:
        fqn: The site, as in its plan.
        adapter: Name of the adapter.
        kind: As in its plan.
        in_features: Width of the input, which is rotated.
        out_features: Width of the output.
        method: The method and its size: the width of a block, or how many directions.
        lowering: How it is run: "rotate" its input; "grouped", in one op with the other readers of
            its input; "shared", by another site's rotation, once for all; "folded on the fly" into
            the weight, in every forward.
        mean_angle: Radians by which a random input is turned, the mean of 16.
        norm: ‖Q‖₂, as in [`Health`][oftfx.Health].
        orthogonality_error: ‖RᵀR − I‖₂, likewise.
        num_trainable: Trainable numbers it holds; 0 when another site holds them.
        bytes: Of its parameters.
        diverged: Whether its map is no rotation any more: no number, or from a series at ‖Q‖ ≥ 1.
        fold_from: From so many rows of its input on, the tokens of a batch, a training step folds
            its weight instead: a compiled one, and an eager one where no norm or gated product made
            that input. None where it never does, and for traces, whose eager steps never do.
    """

    fqn: str
    adapter: str
    kind: str
    in_features: int
    out_features: int
    method: str
    lowering: str
    mean_angle: float
    norm: float
    orthogonality_error: float
    num_trainable: int
    bytes: int
    diverged: bool
    fold_from: int | None = None

    @property
    def angle(self) -> float:
        """Radians, the largest angle by which the rotation turns a plane: 2·arctan‖Q‖₂."""
        return 2 * math.atan(self.norm)

    @property
    def run(self) -> str:
        """The lowering in words, and from how many rows on it is another."""
        return self.lowering + (f", {self.fold_from} rows fold" if self.fold_from else "")


@dataclass(frozen=True)
class Explanation:
    """What [`explain`][oftfx.explain] found.

    ``str()`` is a table: equal layers in one row, with the worst of their norms and errors.

    Attributes:
        sites: In the order of the plans.
        compiled: How many parts of the model are compiled, each by itself.
        counts: What ``backend="oftfx"`` counted in this process so far, of all models: the graphs,
            rotations and cores it was given, how many ops each pass saved, fused or folded, and
            under ``…_left`` how many it could not, for the reasons that its own text gives.
        model: The model's class.
        base_bytes: Of its frozen parameters.
        graph: The graph of one layer, or why there is none; None where it was not asked for.
    """

    sites: tuple[ExplainedSite, ...]
    compiled: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    model: str = ""
    base_bytes: int = 0
    graph: LayerGraph | str | None = None

    def to_json(self) -> str:
        """Everything as JSON text; a number that is not finite is null."""
        return json_text(dataclasses.asdict(self))

    def to_html(self) -> str:
        """Everything as one page of HTML, which needs no other file and no network."""
        from oftfx.explain.page import page

        return page(self)

    def save_html(self, file: str | os.PathLike[str]) -> None:
        """Writes [`to_html`][oftfx.Explanation.to_html]; the file appears whole or not at all.

        Args:
            file: Replaced if it is there; its folder is made if missing.

        Raises:
            OSError: It cannot be written.
        """
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as fresh:
            fresh.write_text(self.to_html(), "utf-8")

    def __str__(self) -> str:
        header, rows = self.summary()
        lines = [table(header, rows, RIGHT), "", self.total()]
        return "\n".join([*lines, *self.compilation()])

    def summary(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of the table."""
        alike: dict[tuple[str, ...], list[ExplainedSite]] = {}
        for site in self.sites:
            row = (shape_of(site.fqn), site.adapter, site.kind, _size(site), site.method)
            alike.setdefault((*row, site.run, f"{site.num_trainable:,}"), []).append(site)
        adapters = {site.adapter for site in self.sites}
        rows = [
            (
                compact([site.fqn for site in members]),
                f"{len(members)}",
                *([adapter] if len(adapters) > 1 else []),
                *row,
                f"{math.degrees(max((site.angle for site in members), key=severity)):.1f}",
                f"{max((site.norm for site in members), key=severity):.4f}",
                f"{max((site.orthogonality_error for site in members), key=severity):.1e}",
                trainable,
                mebibytes(sum(site.bytes for site in members)),
            )
            for (_, adapter, *row, trainable), members in alike.items()
        ]
        which = ["adapter"] if len(adapters) > 1 else []
        how = ("kind", "in×out", "method", "run", "degrees", "‖Q‖", "orthogonality", "trainable")
        return ("site", "×", *which, *how, "MiB"), rows

    def total(self) -> str:
        """How much there is, in a sentence."""
        size = sum(site.bytes for site in self.sites)
        return (
            f"{counted(len(self.sites), 'site')}, "
            f"{sum(site.num_trainable for site in self.sites):,} trainable parameters of "
            f"{mebibytes(size)} MiB; {mebibytes(4 * size)} with gradients and AdamW's state"
        )

    def compilation(self) -> Iterator[str]:
        """What compiling did, in lines; none where nothing is compiled."""
        if self.compiled:
            given = ", ".join(counted(self.counts.get(name, 0), name[:-1]) for name in WHOLE)
            done = (f"{name} {n}" for name, n in self.counts.items() if name not in WHOLE)
            yield f"{counted(self.compiled, 'part')} compiled; so far, {given}"
            yield f"passes: {', '.join(done) or 'none has run'}"


RIGHT = "× in×out degrees ‖Q‖ orthogonality trainable MiB"
"""The columns of the table that align right."""


def severity(value: float) -> float:
    """By which the worst value is the largest: what is no number is worse than any."""
    return math.inf if math.isnan(value) else value


def json_text(value: Any) -> str:
    """A value as JSON text, in which a number that is not finite is null: JSON has no NaN."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _size(site: ExplainedSite) -> str:
    return f"{site.in_features}×{site.out_features}"


def mebibytes(size: int) -> str:
    """A number of bytes in MiB, with one digit."""
    return f"{size / 2**20:,.1f}"
