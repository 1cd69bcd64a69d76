"""Plain-text tables."""

import re

from oftfx import OFT, Plan, Site, Skip
from oftfx.table import compact, shape_of, table


def site(fqn: str, group: int, rotation: str | None = None, **fields) -> Site:
    held = {"kind": "linear", "in_features": 8, "out_features": 4, "layout": "out_in"}
    held |= {"num_trainable": 12 if rotation in (None, fqn) else 0, **fields}
    return Site(fqn=fqn, weight=f"{fqn}.weight", group=group, rotation=rotation or fqn, **held)


def test_columns_are_aligned():
    lines = table(("name", "n"), [("a", "1"), ("long", "1,000")], right="n").split("\n")
    assert lines == ["name      n", "────  ─────", "a         1", "long  1,000"]


def test_a_table_without_rows_is_its_header():
    assert table(("a", "bb"), []).split("\n") == ["a  bb", "─  ──"]


def test_lines_have_no_trailing_blanks():
    text = table(("name", "why"), [("a", ""), ("b", "because")])
    assert all(line == line.rstrip() for line in text.split("\n"))


def test_names_that_differ_in_their_numbers_become_one():
    assert compact(["layers.0.q", "layers.1.q", "layers.29.q"]) == "layers.{0…29}.q"
    assert compact(["a.0.b.3", "a.1.b.3"]) == "a.{0…1}.b.3"
    assert compact(["fc1"]) == "fc1"
    assert shape_of("layers.12.q") == shape_of("layers.3.q") != shape_of("layers.3.k")


def plan() -> Plan:
    sites = [
        site(f"layers.{i}.{leaf}", group=2 * i + (leaf == "o"))
        for i in range(3)
        for leaf in ("q", "k", "o")
    ]
    skipped = [Skip(f"norm.{i}", "no matmul") for i in range(2)] + [Skip("head", "output head")]
    return Plan(OFT(block_size=4), tuple(sites), tuple(skipped))


def test_a_plan_shows_every_layer_once_and_the_totals():
    text = str(plan())
    rows = [line for line in text.split("\n") if line.startswith("layers.")]
    assert len(rows) == 3
    assert all("layers.{0…2}." in row and "8×4" in row and " 3 " in row for row in rows)
    (q,) = [row for row in rows if "}.q" in row]
    assert re.search(r"q k\s+12$", q)  # what reads the same tensor, and the trainable numbers
    (o,) = [row for row in rows if "}.o" in row]
    assert "q k" not in o
    assert "norm.{0…1}" in text
    assert "output head" in text
    last = text.split("\n")[-1]
    assert last == "9 sites, 6 input tensors, 108 trainable parameters, 3 weights left alone"


def test_a_plan_marks_tied_and_shared_sites():
    sites = (
        site("a", 0, tied=True),
        site("b", 0, rotation="a"),
        site("c", 1, kind="functional"),
    )
    text = str(Plan(OFT(block_size=4), sites, ()))
    assert "linear (tied)" in text
    assert "functional" in text
    (row,) = [line for line in text.split("\n") if line.startswith("b")]
    assert row.endswith("shared")
    assert "skipped" not in text


def test_a_plan_off_the_module_tree_says_so():
    text = str(Plan(OFT(block_size=4), (site("a", 0),), (), "modules"))
    assert "module tree" in text
    assert "module tree" not in str(plan())
