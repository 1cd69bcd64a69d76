"""Progress of what may take long outside training: shown only when it does.

On a terminal and where rich is installed, on stderr. Within another line of progress, such as a
stage of the command, it is a remark on that one.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds without a word."""

_lines: list[Callable[[str], None]] = []
"""What shows a remark on each line of progress there is, the innermost last."""


@contextmanager
def remarking(show: Callable[[str], None]) -> Iterator[None]:
    """Within it, a line of progress is there that shows remarks, and no other is opened."""
    _lines.append(show)
    try:
        yield
    finally:
        _lines.remove(show)


def tracked(items: Sequence[T], title: str) -> Iterator[T]:
    """Yields the items; a bar appears when they are slow."""
    begun = time.monotonic()
    show: Callable[[int], None] | None = None
    with ExitStack() as stack:
        for done, item in enumerate(items):
            if show is None and time.monotonic() - begun > PATIENCE:
                show = _counter(stack, title, len(items))
                show(done)
            yield item
            if show is not None:
                show(done + 1)


def _counter(stack: ExitStack, title: str, total: int) -> Callable[[int], None]:
    """What shows how many items are done, until the stack is closed."""
    if _lines:
        remark = _lines[-1]
        stack.callback(remark, "")
        return lambda done: remark(f"{title} {done}/{total}")
    progress = _progress("{task.completed}/{task.total}")
    if progress is None:
        return lambda done: None
    stack.enter_context(progress)
    task = progress.add_task(title, total=total)
    stack.enter_context(remarking(lambda text: progress.update(task, description=text or title)))
    return lambda done: progress.update(task, completed=done)


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Says what is under way in its block once that is slow; for work of unknown length."""
    if _lines:
        remark = _lines[-1]
        remark(title)
        try:
            yield
        finally:
            remark("")
        return
    progress = _progress()
    if progress is None:
        yield
        return
    task = progress.add_task(title, total=None)
    timer = threading.Timer(PATIENCE, progress.start)
    timer.daemon = True
    timer.start()
    try:
        with remarking(lambda text: progress.update(task, description=text or title)):
            yield
    finally:
        timer.cancel()
        timer.join()
        if progress.live.is_started:
            progress.stop()


def _progress(*texts: str) -> "Progress | None":
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TimeElapsedColumn
    except ImportError:
        return None
    screen = Console(stderr=True)
    return Progress("{task.description}", BarColumn(), *texts, TimeElapsedColumn(), console=screen)
