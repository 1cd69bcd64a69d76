"""A bar is shown for what is slow, on a terminal with rich, and never changes what is done."""

import builtins
import io
import sys

import pytest

from oftfx import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch) -> Terminal:
    """Called in the test itself: pytest puts its own stream in place after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def test_what_is_quick_shows_nothing(monkeypatch):
    screen = terminal(monkeypatch)
    assert [*progress.tracked([3, 1, 2], "finding")] == [3, 1, 2]
    assert screen.getvalue() == ""


def test_what_is_slow_shows_a_bar(monkeypatch):
    screen = terminal(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", -1)
    assert [*progress.tracked([3, 1, 2], "finding")] == [3, 1, 2]
    assert "finding" in screen.getvalue()
    assert "100%" in screen.getvalue()


def test_no_terminal_no_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "PATIENCE", -1)
    assert [*progress.tracked([1, 2], "finding")] == [1, 2]
    assert stream.getvalue() == ""


def test_no_rich_no_bar(monkeypatch):
    screen = terminal(monkeypatch)
    real = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    monkeypatch.setattr(progress, "PATIENCE", -1)
    assert [*progress.tracked([1, 2], "finding")] == [1, 2]
    assert screen.getvalue() == ""


def test_an_error_in_the_middle_ends_the_bar(monkeypatch):
    terminal(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", -1)

    def run():
        for item in progress.tracked([1, 2], "finding"):
            raise ValueError(item)

    with pytest.raises(ValueError, match="1"):
        run()
    assert [*progress.tracked([1], "again")] == [1]
