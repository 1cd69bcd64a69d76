"""A layer's graph as a picture: SVG that takes its colours from the page it stands in."""

from html import escape

from oftfx.explain.layer import Box, LayerGraph
from oftfx.explain.layout import HEIGHT, Point, place

MARGIN = 4
LETTERS = 18
"""Of a label, at most."""


def picture(graph: LayerGraph, title: str) -> str:
    """The graph as one ``<svg>``; each box tells its nodes when pointed at."""
    widths = [_width(box) for box in graph.boxes]
    found = place([box.reads for box in graph.boxes], widths)
    lines = [
        f'<path class="{_line(graph, reader, source)}" d="{_path(points)}"/>'
        for reader, source, points in found.lines
    ]
    boxes = [
        _box(box, at, width)
        for box, at, width in zip(graph.boxes, found.boxes, widths, strict=True)
    ]
    width, height = found.width + 2 * MARGIN, found.height + 2 * MARGIN
    return (
        f'<svg class="graph" role="img" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{-MARGIN} {-MARGIN} {width:.0f} {height:.0f}">'
        f"<title>{escape(title)}</title>{''.join(lines)}{''.join(boxes)}</svg>"
    )


def _width(box: Box) -> float:
    return max(44.0, 6.4 * len(_short(box.label)) + 16, 5.2 * len(_short(box.note)) + 14)


def _short(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"


def _box(box: Box, at: Point, width: float) -> str:
    told = escape("\n".join(box.nodes) or box.label)
    middle = 21 if not box.note else 14.5
    note = (
        f'<text class="note" x="{at.x:.1f}" y="{at.y + 27:.1f}">{escape(_short(box.note))}</text>'
    )
    return (
        f'<g class="box {box.kind}"><title>{told}</title>'
        f'<rect x="{at.x - width / 2:.1f}" y="{at.y:.1f}" width="{width:.1f}" height="{HEIGHT}" '
        f'rx="{HEIGHT / 2 if box.kind == "outside" else 5}"/>'
        f'<text x="{at.x:.1f}" y="{at.y + middle:.1f}">{escape(_short(box.label))}</text>'
        f"{note if box.note else ''}</g>"
    )


def _line(graph: LayerGraph, reader: int, source: int) -> str:
    kinds = {graph.boxes[reader].kind, graph.boxes[source].kind}
    return "line inserted" if "inserted" in kinds else "line"


def _path(points: list[Point]) -> str:
    """From the lower edge of the first to the upper edge of the last, straight past boxes."""
    x, y = points[0].x, points[0].y + HEIGHT
    parts = [f"M{x:.1f} {y:.1f}"]
    for point in points[1:]:
        half = (y + point.y) / 2
        parts.append(f"C{x:.1f} {half:.1f} {point.x:.1f} {half:.1f} {point.x:.1f} {point.y:.1f}")
        x, y = point
        if point is not points[-1]:
            y += HEIGHT
            parts.append(f"V{y:.1f}")
    return "".join(parts)
