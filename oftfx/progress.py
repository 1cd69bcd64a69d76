"""A progress bar for what may take long before training: shown only when it does."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds without a bar."""


def tracked(items: Sequence[T], title: str) -> Iterator[T]:
    """Yields the items; a bar appears on stderr when they are slow.

    Nothing is shown where rich is not installed or stderr is no terminal.
    """
    begun = time.monotonic()
    advance = None
    with ExitStack() as stack:
        for done, item in enumerate(items):
            if advance is None and sys.stderr.isatty() and time.monotonic() - begun > PATIENCE:
                try:
                    from rich.console import Console
                    from rich.progress import Progress
                except ImportError:
                    begun = float("inf")
                else:
                    bar = stack.enter_context(Progress(console=Console(stderr=True)))
                    task = bar.add_task(title, total=len(items), completed=done)
                    advance = bar.advance
            yield item
            if advance is not None:
                advance(task)
