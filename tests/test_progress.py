"""A bar is shown for what is slow, on a terminal with rich, and never changes what is done."""

import builtins
import io
import sys
import time

import pytest
from rich.console import Console

from oftfx import progress
from oftfx.train.progress import stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch) -> Terminal:
    """Called in the test itself: pytest puts its own stream in place after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def appears(text: str, screen: io.StringIO) -> bool:
    """Whether it does, within some seconds: screens are drawn ten times in one."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and text not in screen.getvalue():
        time.sleep(0.01)
    return text in screen.getvalue()


def test_what_is_quick_shows_nothing(monkeypatch):
    screen = terminal(monkeypatch)
    assert [*progress.tracked([3, 1, 2], "finding")] == [3, 1, 2]
    assert screen.getvalue() == ""
    assert progress.PATIENCE == 2  # seconds


def test_what_is_slow_shows_a_bar(monkeypatch):
    screen = terminal(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", -1)
    assert [*progress.tracked([3, 1, 2], "finding")] == [3, 1, 2]
    assert "finding" in screen.getvalue()
    assert "3/3" in screen.getvalue()


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


def test_what_has_no_length_is_named_once_it_is_slow(monkeypatch):
    screen = terminal(monkeypatch)
    with progress.waiting("tracing"):
        pass
    assert screen.getvalue() == ""
    monkeypatch.setattr(progress, "PATIENCE", 0)
    with progress.waiting("tracing"):
        assert appears("tracing", screen)


def test_within_another_line_it_is_a_remark(monkeypatch):
    screen, remarks = terminal(monkeypatch), []
    monkeypatch.setattr(progress, "PATIENCE", -1)
    with progress.remarking(remarks.append):
        assert [*progress.tracked([3, 1], "finding")] == [3, 1]
        with progress.waiting("tracing"):
            pass
    assert remarks == ["finding 0/2", "finding 1/2", "finding 2/2", "", "tracing", ""]
    assert screen.getvalue() == ""


def test_a_stage_of_the_command_shows_the_remarks_of_what_runs_in_it():
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    with stage(screen, "Planning"), progress.waiting("tracing Llama"):
        assert appears("tracing Llama", screen.file)


def test_an_error_in_the_middle_ends_the_bar(monkeypatch):
    terminal(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", -1)

    def run():
        for item in progress.tracked([1, 2], "finding"):
            raise ValueError(item)

    with pytest.raises(ValueError, match="1"):
        run()
    assert [*progress.tracked([1], "again")] == [1]
