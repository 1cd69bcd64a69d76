"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside a file's; what is written there takes its place when nothing failed.

    Raises:
        OSError: It cannot take its place, which then keeps what it had.
    """
    fresh = path.with_name(f".{os.getpid()}.{path.name}")  # with its ending, which torch looks at
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
