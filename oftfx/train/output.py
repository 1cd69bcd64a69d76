"""Directories that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oftfx.train.errors import OutputError

MARKER = "oftfx-report.json"
"""The file by which oftfx knows a directory as its own; every staged directory gets one."""


def check(out: Path, force: bool) -> None:
    """Refuses a place that holds something.

    ``force`` replaces what oftfx wrote earlier, and nothing else: no option deletes other files.

    Raises:
        OutputError: ``out`` is a file, or a directory with something in it.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if not out.exists():
        return
    if not (out / MARKER).is_file():
        raise OutputError(f"{out} exists and was not written by oftfx: name another place.")
    if not force:
        raise OutputError(f"{out} holds an earlier result: name another place, or use --force.")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Says of what goes wrong in writing files where they were to go.

    Raises:
        OutputError: No space is left, nothing may be written there, and the like.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{out} cannot be written: {error}") from error


@contextmanager
def staged(out: Path, force: bool = False) -> Iterator[Path]:
    """Yields a directory beside ``out`` that takes its place when the block succeeds.

    Raises:
        OutputError: As for [`check`][oftfx.train.output.check], before the block runs; or nothing
            can be written there.
    """
    out = out.expanduser().resolve()
    check(out, force)
    fresh = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with writing(out):
        fresh.mkdir(parents=True)
    try:
        yield fresh
        # Checked again: training takes hours, and someone may have used the place meanwhile.
        check(out, force)
        if out.exists():
            old = out.with_name(f".{out.name}.{os.getpid()}.old")
            out.rename(old)
            fresh.rename(out)
            shutil.rmtree(old)
        else:
            fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
