"""Files appear whole or not at all."""

import pytest

from oftfx.files import replacing


def test_a_file_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "it.pt2"
    for text in ("first", "second"):
        with replacing(path) as fresh:
            assert fresh.suffix == ".pt2"
            fresh.write_text(text)
            assert not path.exists() if text == "first" else path.read_text() == "first"
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_half_way_leaves_the_one_before_and_nothing_else(tmp_path):
    def write(fresh):
        fresh.write_text("half")
        raise OSError("no space left")

    path = tmp_path / "it.pt2"
    path.write_text("before")
    with pytest.raises(OSError, match="no space"), replacing(path) as fresh:
        write(fresh)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
