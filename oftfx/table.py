"""Plain-text tables: what `print(plan)` and `print(report)` show."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oftfx.plan import Plan


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Aligned columns; the columns whose header is in ``right`` (space separated) align right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rights = [name in right.split() for name in header]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, rights, strict=True)
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("─" * width for width in widths), *map(line, rows)])


def compact(names: Sequence[str]) -> str:
    """One name for several that differ in their numbers: `layers.{0…29}.q_proj`."""
    parts = [re.split(r"(\d+)", name) for name in names]
    out = []
    for column in zip(*parts, strict=True):
        values = sorted(set(column), key=lambda text: (len(text), text))
        out.append(values[0] if len(values) == 1 else f"{{{values[0]}…{values[-1]}}}")
    return "".join(out)


def listed(names: Sequence[str]) -> str:
    """The first eight names, and whether there are more."""
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural but for 1."""
    return f"{number} {noun}" + ("s" if number != 1 else "")


def shape_of(name: str) -> str:
    """A name with its numbers blanked: equal for the same layer of every block."""
    return re.sub(r"\d+", "#", name)


def plan_table(plan: "Plan") -> str:
    """Sites, skipped weights and totals; equal rows of repeated layers become one."""
    members = {group.index: group.sites for group in plan.groups}
    merged: dict[tuple[str, ...], list[str]] = {}
    for site in plan.sites:
        peers = list(dict.fromkeys(name.rpartition(".")[2] for name in members[site.group]))
        row = (
            shape_of(site.fqn),
            site.kind + (" (tied)" if site.tied else ""),
            f"{site.in_features}×{site.out_features}",
            " ".join(peers) if len(peers) > 1 else "",
            f"{site.num_trainable:,}" if not site.shared else "shared",
        )
        merged.setdefault(row, []).append(site.fqn)
    rows = [(compact(names), f"{len(names)}", *row[1:]) for row, names in merged.items()]
    text = table(
        ("site", "×", "kind", "in×out", "reads the same tensor", "trainable"),
        rows,
        right="× in×out trainable",
    )
    if plan.skipped:
        gone: dict[tuple[str, str], list[str]] = {}
        for skip in plan.skipped:
            gone.setdefault((shape_of(skip.name), skip.reason), []).append(skip.name)
        skipped = [(compact(names), f"{len(names)}", reason) for (_, reason), names in gone.items()]
        text += "\n\n" + table(("skipped", "×", "why"), skipped, right="×")
    if plan.copied:
        whole: dict[tuple[str, str], list[str]] = {}
        for copied in plan.copied:
            size = "×".join(map(str, copied.shape))
            whole.setdefault((shape_of(copied.name), size), []).append(copied.name)
        rows = [(compact(names), f"{len(names)}", size) for (_, size), names in whole.items()]
        text += "\n\n" + table(("trained as it is", "×", "shape"), rows, right="×")
    total = (
        f"{counted(len(plan.sites), 'site')}, {counted(len(plan.groups), 'input tensor')}, "
        f"{plan.num_trainable:,} trainable parameters, "
        f"{counted(len(plan.skipped), 'weight')} left alone"
    )
    if plan.capture == "modules":
        total += "\nread off the module tree: functional matmuls and shared inputs are not seen"
    return f"{text}\n\n{total}"
