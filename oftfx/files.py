"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside a file's; what is written there takes its place when nothing failed.

    Raises:
        OSError: It cannot take its place, which then keeps what it had.
    """
    fresh = _beside(path)
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def replace_all(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes files of a directory in their order, once all of them are whole beside their places.

    Raises:
        OSError: One cannot take its place. All have what they had, as whatever else stops it.
    """
    paths = {directory / name: payload for name, payload in files.items()}
    before: dict[Path, bytes | None] = {}
    try:
        for path, payload in paths.items():
            _beside(path).write_bytes(payload)
        for path in paths:
            before[path] = path.read_bytes() if path.is_file() else None
            _beside(path).replace(path)
    except BaseException:
        for path, held in before.items():
            if held is not None:
                with replacing(path) as fresh:
                    fresh.write_bytes(held)
            elif path.is_file():
                path.unlink()
        raise
    finally:
        for path in paths:
            _beside(path).unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.{path.name}")  # with its ending, which torch looks at
