"""Where the boxes of a graph go: in ranks, each box below all it reads, with few crossings.

The usual steps: ranks by the longest path, thin stand-ins where a line passes a rank, an order in
each rank by the neighbours' average, places by the same averages without overlaps.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

HEIGHT, GAP, RANK = 34, 10, 58
"""Of a box; between boxes; from one rank to the next."""
SWEEPS = 12


class Point(NamedTuple):
    """A place; y grows downwards."""

    x: float
    y: float


class Layout(NamedTuple):
    """Where everything is.

    Attributes:
        boxes: The middle of each box's upper edge.
        lines: Reader, read box, and the upper edges that the line between them passes, downwards.
        width: Of it all.
        height: Of it all.
    """

    boxes: list[Point]
    lines: list[tuple[int, int, list[Point]]]
    width: float
    height: float


def place(reads: Sequence[Sequence[int]], widths: Sequence[float]) -> Layout:
    """Places boxes of which each reads earlier ones."""
    ranks = _ranks(reads)
    edges: list[tuple[int, int]] = []
    chains: list[tuple[int, int, list[int]]] = []
    wide = list(widths)
    for reader, sources in enumerate(reads):
        for source in sources:
            chain = [source]
            for rank in range(ranks[source] + 1, ranks[reader]):
                ranks.append(rank)
                wide.append(GAP)
                chain.append(len(wide) - 1)
            chain.append(reader)
            edges += pairwise(chain)
            chains.append((reader, source, chain))
    rows: list[list[int]] = [[] for _ in range(max(ranks) + 1)]
    for node, rank in enumerate(ranks):
        rows[rank].append(node)
    near: list[list[int]] = [[] for _ in wide]
    for above, below in edges:
        near[above].append(below)
        near[below].append(above)
    aside = {node for node, sources in enumerate(reads) if not sources and ranks[node]}
    x = _spread(rows, near, wide, aside)
    left = min(x[node] - wide[node] / 2 for node in range(len(wide)))
    points = [Point(x[node] - left, ranks[node] * RANK) for node in range(len(wide))]
    return Layout(
        points[: len(reads)],
        [(reader, source, [points[node] for node in chain]) for reader, source, chain in chains],
        max(points[node].x + wide[node] / 2 for node in range(len(wide))),
        max(ranks) * RANK + HEIGHT,
    )


def _ranks(reads: Sequence[Sequence[int]]) -> list[int]:
    """A rank below all that is read; what reads nothing stands just above its first reader."""
    ranks: list[int] = []
    for sources in reads:
        ranks.append(max((ranks[source] + 1 for source in sources), default=0))
    for node, sources in enumerate(reads):
        readers = [ranks[reader] for reader, all_of in enumerate(reads) if node in all_of]
        if not sources and readers:
            ranks[node] = min(readers) - 1
    return ranks


def _spread(
    rows: list[list[int]], near: list[list[int]], wide: list[float], aside: set[int]
) -> list[float]:
    """Places in each row, by those of the neighbours in the row above and the row below in turn.

    What comes in from outside further down stands at the left end of its row.
    """
    x = [0.0] * len(wide)
    rank = {node: number for number, row in enumerate(rows) for node in row}
    for row in rows:
        _apart(row, x, wide)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        both = sweep >= SWEEPS - 2
        for number in range(len(rows)) if down else reversed(range(len(rows))):
            row = rows[number]
            before = number - 1 if down else number + 1
            for node in row:
                ends = [x[other] for other in near[node] if both or rank[other] == before]
                if ends:
                    x[node] = sum(ends) / len(ends)
            row.sort(key=lambda node: (node not in aside, x[node]))
            _apart(row, x, wide)
    return x


def _apart(row: list[int], x: list[float], wide: list[float]) -> None:
    """Moves the boxes of a row as little as it takes that none overlap, keeping their order."""
    if not row:
        return
    offset, at = [0.0], 0.0
    for one, next_ in pairwise(row):
        at += (wide[one] + wide[next_]) / 2 + GAP
        offset.append(at)
    # Least squares under an order: neighbours that would overlap move together, as one block.
    blocks: list[tuple[float, int]] = []
    for node, start in zip(row, offset, strict=True):
        block = (x[node] - start, 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, count = blocks.pop()
            total = mean * count + block[0] * block[1]
            block = (total / (count + block[1]), count + block[1])
        blocks.append(block)
    places = [mean for mean, count in blocks for _ in range(count)]
    for node, start, moved in zip(row, offset, places, strict=True):
        x[node] = start + moved
