"""Boxes stand below what they read, do not overlap, and lines go from one to the other."""

from hypothesis import given
from hypothesis import strategies as st

from oftfx.explain.layout import GAP, HEIGHT, RANK, place


@st.composite
def graphs(draw):
    size = draw(st.integers(1, 12))
    reads = [
        tuple(sorted(draw(st.sets(st.integers(0, i - 1), max_size=3)))) if i else ()
        for i in range(size)
    ]
    return reads, [draw(st.floats(20, 150)) for _ in range(size)]


@given(graphs())
def test_whatever_the_graph(graph):
    reads, widths = graph
    found = place(reads, widths)
    for reader, sources in enumerate(reads):
        assert all(found.boxes[reader].y >= found.boxes[source].y + RANK for source in sources)
    for i, one in enumerate(found.boxes):
        assert widths[i] / 2 - 1e-6 <= one.x <= found.width - widths[i] / 2 + 1e-6
        assert one.y + HEIGHT <= found.height
        for j, other in enumerate(found.boxes[:i]):
            if one.y == other.y:
                room = (widths[i] + widths[j]) / 2 + GAP
                assert abs(one.x - other.x) >= room - 1e-6
    assert sorted((reader, source) for reader, source, _ in found.lines) == sorted(
        (reader, source) for reader, sources in enumerate(reads) for source in sources
    )
    for reader, source, points in found.lines:
        assert (points[0], points[-1]) == (found.boxes[source], found.boxes[reader])
        assert [point.y for point in points] == [points[0].y + RANK * i for i in range(len(points))]


def test_a_line_around_a_branch_goes_beside_it():
    found = place([(), (0,), (1,), (0, 2)], [60, 60, 60, 60])
    (around,) = (points for _, _, points in found.lines if len(points) == 4)
    for passed, box in zip(around[1:-1], found.boxes[1:3], strict=True):
        assert abs(passed.x - box.x) >= 30 + GAP


def test_what_comes_in_further_down_stands_at_the_left_just_above_its_reader():
    found = place([(), (), (0,), (0,), (1, 2, 3)], [50, 50, 50, 50, 50])
    late, *row = (found.boxes[i] for i in (1, 2, 3))
    assert {box.y for box in row} == {late.y}
    assert late.x < min(box.x for box in row)
