"""What a finetuning job found: as JSON and on the terminal."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from oftfx.explain.explanation import json_text
from oftfx.train.measure import Change


@dataclass(frozen=True)
class Samples:
    """What the model makes of one prompt before and after."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class SiteHealth:
    """One rotation after training: ``norm`` is ‖Q‖₂, ``angle`` its largest, in radians."""

    fqn: str
    norm: float
    angle: float
    orthogonality_error: float


@dataclass(frozen=True)
class Reload:
    """The merged model, loaded without oftfx, against the adapted one before merging.

    Attributes:
        max_difference: Largest absolute difference between logits.
        scale: Largest absolute logit.
        same_top: Share of positions with the same most likely token.
        tolerance: What rounding the folded weights to their dtype may cost, relative to scale.
    """

    max_difference: float
    scale: float
    same_top: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is rounding and nothing else."""
        return self.max_difference <= self.tolerance * self.scale


@dataclass
class Curves:
    """Losses by step; step 0 is the base model."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Everything a job measured."""

    version: str
    job: dict[str, Any]
    parameters: int
    trainable: int
    tokens: int
    seconds: float
    task: Change
    unrelated: Change | None
    samples: Samples | None
    sites: list[SiteHealth]
    reload: Reload | None
    curves: Curves

    @property
    def worst(self) -> SiteHealth:
        """The site furthest from orthogonal."""
        return max(self.sites, key=lambda site: site.orthogonality_error)

    def save(self, path: Path) -> None:
        """Writes the report as JSON; a number that is not finite is null."""
        path.write_text(json_text(dataclasses.asdict(self)) + "\n")


def show(report: Report, out: Path, console: Console) -> None:
    """Prints the report: numbers, samples, and where everything is."""
    console.print(_losses(report))
    console.print(_facts(report))
    if report.samples:
        console.print(_samples(report.samples))
    console.print(_places(report, out))


def _losses(report: Report) -> Table:
    table = Table(title="Loss, nats per token (± standard error)", title_justify="left")
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    for name, change in (("task, held out", report.task), ("unrelated text", report.unrelated)):
        if change is None:
            continue
        good = change.change.mean <= 0
        delta = Text(f"{change.change:+}", style="green" if good else "yellow")
        table.add_row(name, str(change.before), str(change.after), delta)
    return table


def _facts(report: Report) -> Table:
    worst = report.worst
    angle = max(site.angle for site in report.sites)
    table = Table.grid(padding=(0, 2))
    share = report.trainable / report.parameters
    table.add_row("trainable parameters", f"{report.trainable:,} ({share:.2%} of the model)")
    table.add_row("rotations", f"{len(report.sites)}, largest angle {angle:.3f} rad")
    table.add_row("worst orthogonality error", f"{worst.orthogonality_error:.1e} ({worst.fqn})")
    table.add_row("trained on", f"{report.tokens:,} tokens in {report.seconds:.0f} s")
    if report.reload:
        reload = report.reload
        verdict = "[green]agrees[/]" if reload.agrees else "[red]DISAGREES[/]"
        table.add_row(
            "merged, without oftfx",
            f"{verdict}: largest logit difference {reload.max_difference:.1e} "
            f"of {reload.scale:.0f}, same top token at {reload.same_top:.1%}",
        )
    return table


def _samples(samples: Samples) -> Panel:
    def paragraph(title: str, style: str, continuation: str) -> Text:
        return Text.assemble(
            (f"{title}\n", f"bold {style}"), (samples.prompt, "dim"), continuation.rstrip(), "\n"
        )

    parts = Group(
        paragraph("before", "yellow", samples.before), paragraph("after", "green", samples.after)
    )
    return Panel(parts, title="The same prompt, the same seed", title_align="left")


def _places(report: Report, out: Path) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("picture", str(out / "training.png"))
    table.add_row("adapter", str(out / "adapter"))
    if report.reload:
        table.add_row("merged model", str(out / "merged"))
    return table
