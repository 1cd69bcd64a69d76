"""An explanation as one page of HTML: no script, no other file, no network."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from string import Template

from oftfx.explain.explanation import RIGHT, WHOLE, ExplainedSite, Explanation, mebibytes, severity
from oftfx.explain.heat import METRICS, SCROLLS, heat_maps
from oftfx.explain.layer import LayerGraph
from oftfx.explain.svg import picture
from oftfx.table import counted, listed

LOWERINGS = {
    "rotate": "rotates its input",
    "grouped": "rotates its input in one op with the other readers of it",
    "shared": "reads an input that another site's rotation turned, once for all",
    "folded on the fly": "folds the rotation into its weight in every forward",
}


def page(found: Explanation) -> str:
    """The page."""
    frame = files("oftfx.explain").joinpath("page.html").read_text("utf-8")
    title = f"{found.model} explained by oftfx"
    return Template(frame).substitute(title=escape(title), body="\n".join(_body(found)))


def _body(found: Explanation) -> Iterator[str]:
    yield f"<header><h1>{escape(found.model)}</h1><p>{escape(found.total())}.</p></header>"
    yield _tiles(found)
    yield _warnings(found.sites)
    yield heat_maps(found.sites)
    yield _runs(found)
    if found.compiled:
        yield _passes(found)
    if found.graph is not None:
        yield _drawn(found.graph)
    yield _all(found.sites)


def _tiles(found: Explanation) -> str:
    turned = max(found.sites, key=lambda site: severity(site.norm))
    farthest = max(found.sites, key=lambda site: severity(site.orthogonality_error))
    mean = sum(site.mean_angle for site in found.sites) / len(found.sites)
    size = sum(site.bytes for site in found.sites)
    tiles = (
        ("sites", f"{len(found.sites)}", ", ".join(sorted({s.method for s in found.sites}))),
        ("trainable", f"{sum(site.num_trainable for site in found.sites):,}", "numbers"),
        (
            "memory",
            f"{mebibytes(size)} MiB",
            f"beside {mebibytes(found.base_bytes)} MiB of frozen weights",
        ),
        ("largest angle", f"{math.degrees(turned.angle):.1f}°", turned.fqn),
        ("mean angle", f"{math.degrees(mean):.1f}°", "over all sites"),
        ("orthogonality error", f"{farthest.orthogonality_error:.0e}", f"at most; {farthest.fqn}"),
    )
    cells = (
        f"<div><dt>{name}</dt><dd><b>{escape(value)}</b><small>{_breakable(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _warnings(sites: Sequence[ExplainedSite]) -> str:
    bad = [site.fqn for site in sites if site.diverged]
    if not bad:
        return ""
    return (
        f'<p class="warning" role="alert"><b>{counted(len(bad), "site")} diverged</b> '
        f"({escape(listed(bad))}): not finite, or a series at ‖Q‖ ≥ 1, where it gives no rotation. "
        "Lower the learning rate, or use <code>guard</code> or <code>exact=True</code>.</p>"
    )


def _runs(found: Explanation) -> str:
    header, rows = found.summary()
    used = {site.lowering for site in found.sites}
    words = "".join(
        f"<li><b>{name}</b>: {LOWERINGS[name]}</li>" for name in LOWERINGS if name in used
    )
    if any(site.fold_from for site in found.sites):
        words += (
            "<li><b>rows fold</b>: with so many rows of input (tokens of a batch) or more, a "
            "training step compiled by oftfx, or an eager one behind no norm or gated product, "
            "folds the rotation into the weight instead</li>"
        )
    return (
        "<section><h2>How each site is run, and what it takes</h2>"
        f"{_table(header, rows, RIGHT.split())}<ul>{words}</ul></section>"
    )


def _passes(found: Explanation) -> str:
    given, done = found.compilation()
    rows = [(name, f"{n}") for name, n in found.counts.items() if name not in WHOLE]
    shown = _table(("pass", "times"), rows, ["times"]) if rows else f"<p>{escape(done)}</p>"
    return (
        f"<section><h2>What the compiler's passes did</h2><p>{escape(given)}.</p>{shown}"
        "<p>Each line counts what a pass grouped, fused or folded; what it had to leave as it was "
        "is under <code>…_left</code>, and runs as a plain rotation.</p></section>"
    )


def _drawn(graph: LayerGraph | str) -> str:
    if isinstance(graph, str):
        return (
            f"<section><h2>One layer</h2><p>Its graph is not shown. {escape(graph)}</p></section>"
        )
    name = graph.layer or "the model"
    figures = "".join(
        f"<figure><figcaption>{title}</figcaption>"
        f"{SCROLLS}{picture(shown, f'{name}, {title}')}</div></figure>"
        for title, shown in (("before", graph.before()), ("after", graph))
    )
    lines = "".join(
        f"<li>{escape(box.label)}"
        + (", inserted" if box.kind == "inserted" else "")
        + (f" ({escape(box.note)})" if box.note else "")
        + (
            f" reads {escape(', '.join(graph.boxes[i].label for i in box.reads))}"
            if box.reads
            else ""
        )
        + "</li>"
        for box in graph.boxes
    )
    more = f"<p>{graph.left_out} more boxes are not shown.</p>" if graph.left_out else ""
    return (
        f"<section><h2>One layer before and after: {escape(name)}</h2>"
        "<p>As it was captured; the filled boxes are what oftfx inserted. Point at a box for its "
        f'nodes.</p><div class="pair">{figures}</div>{more}'
        f"<details><summary>In words</summary><ol>{lines}</ol></details></section>"
    )


def _all(sites: Sequence[ExplainedSite]) -> str:
    header = ("site", "adapter", "run", *(metric.label for metric in METRICS), "trainable", "MiB")
    rows = [
        (
            site.fqn,
            site.adapter,
            site.run,
            *(metric.text(metric.value(site)) for metric in METRICS),
            f"{site.num_trainable:,}",
            mebibytes(site.bytes),
        )
        for site in sites
    ]
    shown = _table(header, rows, header[3:])
    return (
        f"<details><summary>All {counted(len(sites), 'site')} in a table</summary>{shown}</details>"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str]) -> str:
    ends = [' class="num"' if name in right else "" for name in header]

    def row(tag: str, cells: Sequence[str]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        inside = (
            f"<{tag}{scope}{end}>{_breakable(cell)}</{tag}>"
            for cell, end in zip(cells, ends, strict=True)
        )
        return f"<tr>{''.join(inside)}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    return (
        f'{SCROLLS}<table class="plain"><thead>{row("th", header)}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _breakable(text: str) -> str:
    """Escaped, with leave to break a line after each dot of a name."""
    return re.sub(r"\.(?=[^\W\d])", ".<wbr>", escape(text))
