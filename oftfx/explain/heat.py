"""The heat map of an explanation's page: a table whose cells are coloured by how far a site turned.

What it shows is switched by the state of radio buttons; the style sheet mixes the colours from each
cell's place on the scale, so that light and dark share one page.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

from oftfx.explain.explanation import ExplainedSite
from oftfx.explain.grid import Cell, grid, leaves

SCROLLS = '<div class="wide" tabindex="0" role="region" aria-label="scrolls sideways">'
WIDE = 8
"""Columns that a page has room for."""


class Metric(NamedTuple):
    """One of the quantities that the heat map shows."""

    key: str
    label: str
    note: str
    value: Callable[[ExplainedSite], float]
    text: Callable[[float], str]
    unit: str = ""
    logarithmic: bool = False


METRICS = (
    Metric(
        "worst",
        "Largest angle",
        "The largest angle by which the rotation turns a plane, in degrees.",
        lambda site: math.degrees(site.angle),
        "{:.1f}".format,
        "°",
    ),
    Metric(
        "mean",
        "Mean angle",
        "The angle by which a random input is turned, in degrees.",
        lambda site: math.degrees(site.mean_angle),
        "{:.1f}".format,
        "°",
    ),
    Metric(
        "norm",
        "‖Q‖",
        "The norm of the skew-symmetric matrix behind the rotation. A Cayley–Neumann series "
        "diverges from 1 on.",
        lambda site: site.norm,
        "{:.2f}".format,
    ),
    Metric(
        "error",
        "Orthogonality error",
        "‖RᵀR − I‖: how far the map is from a rotation. The colours follow its logarithm.",
        lambda site: site.orthogonality_error,
        "{:.0e}".format,
        logarithmic=True,
    ),
)


def heat_maps(sites: Sequence[ExplainedSite]) -> str:
    """The section of the page: what to show, and a map of each adapter."""
    adapters: dict[str, list[ExplainedSite]] = {}
    for site in sites:
        adapters.setdefault(site.adapter, []).append(site)
    maps = (_map(mine, name if len(adapters) > 1 else "") for name, mine in adapters.items())
    heading = "<h2>How far each site has turned</h2>"
    return f'<section class="heat">{heading}{_switches()}{"".join(maps)}</section>'


def _switches() -> str:
    """The radio buttons, and a line for what each chooses."""
    buttons = "".join(
        f'<input type="radio" name="metric" id="show-{metric.key}"{" checked" * (not i)}>'
        f'<label for="show-{metric.key}">{metric.label}</label>'
        for i, metric in enumerate(METRICS)
    )
    notes = "".join(f'<p class="only {metric.key}">{metric.note}</p>' for metric in METRICS)
    legend = '<legend class="unseen">What the table shows</legend>'
    return f"<fieldset>{legend}{buttons}</fieldset>{notes}"


def _map(sites: Sequence[ExplainedSite], caption: str) -> str:
    """The table of one adapter, and the scale of its colours."""
    cells = grid(site.fqn for site in sites)
    at: dict[Cell, ExplainedSite] = {cells[site.fqn]: site for site in sites}
    rows = list(dict.fromkeys(cell.row for cell in cells.values()))
    columns = list(dict.fromkeys(cell.column for cell in cells.values()))
    heads, prefix = leaves(columns), _prefix(rows)
    scales = [_scale(metric, sites) for metric in METRICS]
    head = "".join(
        f'<th scope="col" title="{escape(column)}"><span>{escape(heads[column])}</span></th>'
        for column in columns
    )
    body = "".join(
        f'<tr><th scope="row" title="{escape(row)}">{escape(row[len(prefix) :] or "model")}</th>'
        + "".join(_cell(at.get(Cell(row, column)), scales) for column in columns)
        + "</tr>"
        for row in rows
    )
    corner = escape(prefix.rstrip(".")) or "layer"
    # What scrolls sideways clips the tips, so only what must.
    wide = SCROLLS if len(columns) > WIDE else "<div>"
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    legend = "".join(
        f'<span class="only {metric.key}"><span>{scale.low}</span><i></i><span>{scale.high}</span>'
        "</span>"
        for metric, scale in zip(METRICS, scales, strict=True)
    )
    return (
        f'{wide}<table class="map">{named}<thead><tr><th class="corner">{corner}</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="legend" role="note" aria-label="Colour scale">{legend}</p>'
    )


class _Scale(NamedTuple):
    """Where a value stands between the ends of the colours, and what the ends are called."""

    place: Callable[[float], float]
    low: str
    high: str


def _scale(metric: Metric, sites: Iterable[ExplainedSite]) -> _Scale:
    values = [metric.value(site) for site in sites]
    finite = [value for value in values if math.isfinite(value)]
    high = max(finite, default=0.0)
    if not metric.logarithmic:
        return _Scale(lambda value: value / high if high else 0.0, "0", metric.text(high))
    low = min((value for value in finite if value > 0), default=0.0)
    span = math.log(high / low) if low else 0.0

    def place(value: float) -> float:
        return math.log(value / low) / span if value > 0 and span else float(value > 0)

    return _Scale(place, metric.text(low), metric.text(high))


def _cell(site: ExplainedSite | None, scales: Sequence[_Scale]) -> str:
    if site is None:
        return "<td></td>"
    places, texts, told = [], [], []
    for metric, scale in zip(METRICS, scales, strict=True):
        value = metric.value(site)
        place = scale.place(value) if math.isfinite(value) else 1.0
        places.append(f"--{metric.key}:{place:.2f}")
        texts.append(f'<span class="only {metric.key}">{metric.text(value)}</span>')
        told.append(f"{metric.label}: {metric.text(value)}{metric.unit}")
    size = f"{site.in_features} → {site.out_features}, {site.method}, {site.run}"
    tip = "<br>".join(map(escape, (site.fqn, size, *told)))
    broken = ' class="broken"' if site.diverged else ""
    return (
        f'<td{broken} tabindex="-1" style="{";".join(places)}">{"".join(texts)}'
        f'<span class="tip" aria-hidden="true">{tip}</span></td>'
    )


def _prefix(rows: Sequence[str]) -> str:
    """What all rows begin with, up to a dot."""
    if len(rows) < 2:
        return ""
    first, last = min(rows), max(rows)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return first[: first.rfind(".", 0, same) + 1]
