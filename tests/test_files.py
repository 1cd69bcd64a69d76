"""Files appear whole or not at all."""

import os
from pathlib import Path

import pytest

from oftfx.files import replace_all, replacing


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


BEFORE = {"one": b"1", "two": b"2"}


def held(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("there", [BEFORE, {}])
def test_of_several_files_all_or_none_take_their_places(
    tmp_path, monkeypatch, error, fails_at, there
):
    replace_all(tmp_path, there)
    replace, calls = os.replace, []

    def failing(*args):
        calls.append(args)
        if len(calls) == fails_at:
            raise error
        replace(*args)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(error):
        replace_all(tmp_path, {"one": b"new", "two": b"new"})
    monkeypatch.undo()
    assert held(tmp_path) == there


def test_all_are_written_before_the_first_takes_its_place(tmp_path, monkeypatch):
    replace_all(tmp_path, BEFORE)
    write, seen = Path.write_bytes, []

    def watched(self, payload):
        seen.append({name: held(tmp_path)[name] for name in BEFORE})
        return write(self, payload)

    monkeypatch.setattr(Path, "write_bytes", watched)
    replace_all(tmp_path, {"one": b"new", "two": b"new"})
    assert seen == [BEFORE, BEFORE]
    assert held(tmp_path) == {"one": b"new", "two": b"new"}
