import errno
import os

import pytest

import oftfx
from oftfx.train import publish
from oftfx.train.errors import OutputError
from oftfx.train.output import MARKER, staged


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_appears_whole(tmp_path):
    with staged(tmp_path / "deep" / "out") as fresh:
        (fresh / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["file"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "out") as fresh:  # noqa: PT012
        (fresh / "file").write_text("x")
        raise RuntimeError
    assert names(tmp_path) == []


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as fresh:
        (fresh / "file").write_text("x")
    assert names(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("force", [False, True])
def test_foreign_files_are_never_replaced(tmp_path, force):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not written by oftfx"), staged(tmp_path, force):
        pass
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_is_in_the_way(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="not written by oftfx"), staged(tmp_path / "out", True):
        pass


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="out cannot be written"), staged(tmp_path / "file/out"):
        pass


def test_a_full_disk_leaves_nothing(model, tokenizer, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    oftfx.adapt(model, oftfx.OFT(block_size=16))
    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OutputError, match="No space left"), staged(tmp_path / "out") as fresh:
        publish.publish(model, tokenizer, fresh)
    assert names(tmp_path) == []


def test_an_earlier_result_needs_force(tmp_path):
    for word in ("old", "new"):
        with staged(tmp_path / "out", force=word == "new") as fresh:
            (fresh / MARKER).write_text(word)
    assert (tmp_path / "out" / MARKER).read_text() == "new"
    with pytest.raises(OutputError, match="--force"), staged(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]
