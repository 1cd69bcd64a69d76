"""What `benchmarks/methods.py` found: curves of gain against forgetting, and tables.

A method's curve runs through its learning rates, each point the mean over the seeds. Forgetting at
a given gain is read off it between two neighbouring rates, on a logarithmic scale of forgetting and
of the rate, and only as far as more of a rate still brings more gain.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from arms import ARMS, LORA, OFT, OVERLAY, PEFT_OFT, SEEDS, Arm
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from oftfx.train.plot import COLOURS, INK, MARKERS

GAINS = (0.50, 0.55, 0.60, 0.65)
PANELS = {
    "methods": "oftfx, about 2.4M numbers",
    "variants": "oftfx, fewer numbers or other directions",
    "PEFT": "PEFT's own",
}
LEAST = 1e-3  # nats: less forgetting than this is none


@dataclass(frozen=True)
class Point:
    """One learning rate of a method: its trainings, one a seed."""

    rate: float
    gains: tuple[float, ...]
    forgettings: tuple[float, ...]

    @property
    def gain(self) -> float:
        return statistics.mean(self.gains)

    @property
    def forgetting(self) -> float:
        return statistics.mean(self.forgettings)


@dataclass(frozen=True)
class At:
    """Where a curve reaches a gain."""

    rate: float
    forgetting: float


def report(rows: list[dict[str, Any]], out: Path) -> None:
    """Writes the pictures and prints the tables."""
    out.mkdir(parents=True, exist_ok=True)
    curves = {arm.name: points(rows, arm.name) for arm in ARMS}
    draw(curves, out / "methods.png")
    setting = next(row for row in rows if row["kind"] == "setting")
    print("setting:", ", ".join(f"{key} {value}" for key, value in setting.items()), "\n")
    print(summary(rows, curves), "\n")
    print(everything(curves), "\n")
    if overlay(rows, out / "oft-beside-peft.png"):
        print("two loss curves:", out / "oft-beside-peft.png", "\n")
    for row in rows:
        if row["kind"] == "error":
            print("failed:", row["of"], row["arm"], row["error"].strip().splitlines()[-1])


def points(rows: list[dict[str, Any]], arm: str, seed: int | None = None) -> list[Point]:
    """A method's curve, by rising learning rate; of all seeds, or of one."""
    found = defaultdict(list)
    for row in rows:
        if row["kind"] == "training" and row["arm"] == arm and seed in (None, row["seed"]):
            found[row["rate"]].append((row["gain"], row["forgetting"]))
    return [
        Point(rate, *map(tuple, zip(*values, strict=True)))
        for rate, values in sorted(found.items())
    ]


def at(curve: Sequence[Point], gain: float) -> At | None:
    """Where the rising part of a curve reaches a gain; None where it does not."""
    for low, high in pairwise(curve):
        if high.gain <= low.gain:
            return None
        if low.gain <= gain <= high.gain:
            share = (gain - low.gain) / (high.gain - low.gain)
            return At(
                _between(low.rate, high.rate, share),
                _between(max(low.forgetting, LEAST), max(high.forgetting, LEAST), share),
            )
    return None


def _between(low: float, high: float, share: float) -> float:
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def summary(rows: list[dict[str, Any]], curves: dict[str, list[Point]]) -> str:
    """One line a method: size, cost, and forgetting at equal gain, beside LoRA's."""
    costs = {row["arm"]: row for row in rows if row["kind"] == "cost"}
    base = costs.get("frozen base")
    header = ["method", "trained", "ms a step", "peak GiB", "best gain", "rate for a gain of .60"]
    header += [f"forgets at {gain:.2f} (× LoRA)" for gain in GAINS]
    lines = [header, ["---"] * len(header)]
    if base:
        lines.append(["frozen base", "0", *_cost(base), *[""] * (len(header) - 4)])
    for arm in ARMS:
        curve, cost = curves[arm.name], costs.get(arm.name)
        if arm is OVERLAY or not (curve or cost):
            continue
        middle = at(curve, 0.60)
        lines.append(
            [
                arm.name,
                f"{_parameters(rows, arm) / 1e6:.2f}M",
                *(_cost(cost) if cost else ("–", "–")),
                f"{max(point.gain for point in curve):.3f}" if curve else "–",
                f"{middle.rate:.1e}" if middle else "–",
                *(_forgetting(rows, arm, gain) for gain in GAINS),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _parameters(rows: list[dict[str, Any]], arm: Arm) -> int:
    mine = (row for row in rows if row.get("arm") == arm.name)
    return next(row["parameters"] for row in mine if "parameters" in row)


def _cost(row: dict[str, Any]) -> tuple[str, str]:
    peak = row["peak_gib"]
    return f"{row['step_seconds'] * 1000:.0f}", "–" if peak is None else f"{peak:.1f}"


def _forgetting(rows: list[dict[str, Any]], arm: Arm, gain: float) -> str:
    mine, theirs = at(points(rows, arm.name), gain), at(points(rows, LORA.name), gain)
    if mine is None:
        return "–"
    places = (at(points(rows, arm.name, seed), gain) for seed in SEEDS)
    seeds = [place.forgetting for place in places if place]
    spread = f" ± {statistics.stdev(seeds):.3f}" if len(seeds) > 1 else ""
    ratio = f" ({mine.forgetting / theirs.forgetting:.2f})" if theirs else ""
    return f"{mine.forgetting:.3f}{spread}{ratio}"


def everything(curves: dict[str, list[Point]]) -> str:
    """Every point: means over the seeds with their standard deviations."""
    lines = ["| method | rate | seeds | gain | forgetting |", "|---|---|---|---|---|"]
    for name, curve in curves.items():
        for point in curve:
            lines.append(
                f"| {name} | {point.rate:g} | {len(point.gains)} "
                f"| {_spread(point.gains)} | {_spread(point.forgettings)} |"
            )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """Writes a PNG: gain against forgetting, LoRA and OFT in every panel."""
    figure = Figure(figsize=(14, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (panel, title) in zip(
        figure.subplots(1, len(PANELS), sharex=True, sharey=True), PANELS.items(), strict=True
    ):
        others = [arm for arm in ARMS if arm.panel == panel and arm not in (LORA, OFT)]
        _curve(axes, curves[LORA.name], LORA.name, INK, "x", 2.4)
        for index, arm in enumerate((OFT, *others)):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            _curve(axes, curves[arm.name], arm.name, colour, marker, 1.6)
        axes.set_title(title, loc="left", color=INK, fontweight="bold")
        axes.set_xlabel("forgetting: loss added on unrelated text, nats per token", color=INK)
        axes.set_xscale("symlog", linthresh=0.05, linscale=0.5)
        axes.set_xlim(left=0)
        axes.set_xticks([0, 0.05, 0.1, 0.2, 0.4, 0.8], ["0", ".05", ".1", ".2", ".4", ".8"])
        axes.grid(color="#E6EAEE", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13),
            ncols=2,
        )
        if panel == next(iter(PANELS)):
            axes.set_ylabel("gain: loss taken off held-out text, nats per token", color=INK)
    figure.savefig(path)


def _curve(
    axes: Axes, curve: list[Point], name: str, colour: str, marker: str, width: float
) -> None:
    """A line through the means, with the seeds' standard deviations as crosses."""
    if not curve:
        return
    x, y = ([getattr(point, field) for point in curve] for field in ("forgetting", "gain"))
    axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=width, label=name)
    for point in curve:
        if len(point.gains) > 1:
            axes.errorbar(
                point.forgetting,
                point.gain,
                xerr=statistics.stdev(point.forgettings),
                yerr=statistics.stdev(point.gains),
                color=colour,
                linewidth=0.8,
            )


def overlay(rows: list[dict[str, Any]], path: Path) -> bool:
    """Writes a PNG of the training loss of OFT in both libraries, at one seed and polynomial."""
    found = {
        (row["arm"], row["rate"], row["seed"]): row["losses"]
        for row in rows
        if row["kind"] == "training"
    }
    ours = found.get((OVERLAY.name, OVERLAY.rates[0], 0))
    theirs = found.get((PEFT_OFT.name, OVERLAY.rates[0], 0))
    if ours is None or theirs is None:
        return False
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    figure = Figure(figsize=(9, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(theirs, color=COLOURS[1], linewidth=3, alpha=0.5, label="PEFT")
    axes.plot(ours, color=COLOURS[0], linewidth=1, label="oftfx")
    axes.set_title("OFT, b = 32, the same batches", loc="left", color=INK, fontweight="bold")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("training loss, nats per token", color=INK)
    axes.grid(axis="y", color="#E6EAEE", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False,
        labelcolor=INK,
        title=f"largest difference {max(apart):.4f}, mean {statistics.mean(apart):.4f}",
    )
    figure.savefig(path)
    return True
