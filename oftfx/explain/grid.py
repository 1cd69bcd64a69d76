"""Names of sites → the rows and columns of a table: a row a layer, a column a place in it."""

from collections.abc import Iterable
from typing import NamedTuple


class Cell(NamedTuple):
    """Where a site stands: ``row`` names its layer, empty for the model itself."""

    row: str
    column: str


def grid(names: Iterable[str]) -> dict[str, Cell]:
    """The place of each name, cut after one of its numbers: `layers.3` and `mlp.up_proj`.

    Where names have several numbers, as an expert's in a layer, it is after the first or the last,
    whichever makes the smaller table.
    """
    names = list(names)
    first, last = ({name: _cut(name, which) for name in names} for which in (0, -1))
    return min(last, first, key=_area)


def leaves(columns: Iterable[str]) -> dict[str, str]:
    """Each column by its last part, or in full where that does not tell it from another."""
    columns = list(columns)
    ends = [column.rpartition(".")[2] for column in columns]
    return {
        column: end if ends.count(end) == 1 else column
        for column, end in zip(columns, ends, strict=True)
    }


def _cut(name: str, which: int) -> Cell:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    at = numbers[which] + 1 if numbers else 0
    return Cell(".".join(parts[:at]), ".".join(parts[at:]))


def _area(cells: dict[str, Cell]) -> int:
    rows, columns = ({*kind} for kind in zip(*cells.values(), strict=True))
    return len(rows) * len(columns)
