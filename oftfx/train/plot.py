"""The picture of a job: how the loss fell, and how far every layer turned."""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from oftfx.train.report import Report, SiteHealth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by everyone; yellow is left out as too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
MARKERS = "osD^vP*"
TRAIN, HELD_OUT, UNRELATED = "#9AA5B1", "#0072B2", "#D55E00"
INK = "#22303C"


def draw(report: Report, path: Path) -> None:
    """Writes a PNG: the loss on the left, rotation angles by layer on the right."""
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no window system, and no global state of pyplot
    left, right = figure.subplots(1, 2)
    _losses(left, report)
    _angles(right, report.sites)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(TRAIN)
        axes.tick_params(colors=INK, labelsize=9)
        axes.grid(axis="y", color="#E6EAEE", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(path)


def _losses(axes: "Axes", report: Report) -> None:
    steps, values = zip(*report.curves.train, strict=True)
    axes.plot(steps, values, color=TRAIN, linewidth=1, alpha=0.7, label="training, each step")

    points = report.curves.held_out
    axes.plot(
        *zip(*points, strict=True),
        color=HELD_OUT,
        linewidth=2,
        marker="o",
        markersize=5,
        label=f"held out, {report.task.change:+}",
    )
    if report.unrelated:
        change = report.unrelated
        axes.plot(
            [0, points[-1][0]],
            [change.before.mean, change.after.mean],
            color=UNRELATED,
            linewidth=1.4,
            linestyle="--",
            marker="s",
            markersize=4,
            label=f"unrelated text, {change.change:+}",
        )
    axes.set_title("Loss, and its change", loc="left", color=INK, fontweight="bold")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("nats per token", color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _angles(axes: "Axes", sites: list[SiteHealth]) -> None:
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for index, site in enumerate(sites):
        # A site outside any numbered layer is drawn at its place in the plan.
        layer = re.search(r"\.(\d+)\.", site.fqn)
        name = site.fqn.rpartition(".")[2]
        lines[name].append((int(layer[1]) if layer else index, math.degrees(site.angle)))
    for index, (name, points) in enumerate(lines.items()):
        layers, degrees = zip(*sorted(points), strict=True)
        axes.plot(
            layers,
            degrees,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1.3,
            label=name,
        )
    axes.set_ylim(bottom=0)
    axes.set_title("Largest rotation angle", loc="left", color=INK, fontweight="bold")
    axes.set_xlabel("layer", color=INK)
    axes.set_ylabel("degrees", color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=2 if len(lines) > 4 else 1)
