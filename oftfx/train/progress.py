"""One progress line a stage of the job."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from oftfx.progress import remarking


class Stage:
    """A running stage; moves its own line."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, count: int = 1) -> None:
        """Counts finished units of the stage's total."""
        self._progress.update(self._task, advance=count)

    def note(self, text: str) -> None:
        """Shows a short remark at the end of the line."""
        self._progress.update(self._task, note=text)


@contextmanager
def stage(console: Console, title: str, total: int | None = None) -> Iterator[Stage]:
    """Shows a stage while its block runs: a bar for a known total, else a moving one.

    The finished line stays. Where the console is no terminal, only that is printed.
    """
    columns = [
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description:<23}"),
        BarColumn(bar_width=16),
        *([MofNCompleteColumn()] if total else []),
        TimeElapsedColumn(),
        *([TimeRemainingColumn()] if total else []),
        TextColumn("[dim]{task.fields[note]}"),
    ]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, note="")
        line = Stage(progress, task)
        with remarking(line.note):
            yield line
        progress.update(task, total=total or 1, completed=total or 1)
