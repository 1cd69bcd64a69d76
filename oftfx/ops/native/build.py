"""Builds `kernels.c` with the C compiler of the machine, once for each of its processors' kinds."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
NATIVE = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
# IEEE arithmetic throughout: inf and NaN go where the mathematics sends them.
FLAGS = (
    *("-O3", NATIVE, "-funroll-loops", "-fno-math-errno", "-ffp-contract=fast"),
    *("-std=gnu11", "-fPIC", "-shared"),
)


class BuildError(Exception):
    """Why there is no library; never leaves this package."""


def built() -> Path:
    """The library, from the user's cache or built into it.

    Raises:
        BuildError: There is no compiler, it fails, or the cache cannot be written.
    """
    compiler = _compiler()
    # What the compiler defines tells its version and what this processor can do.
    known = _run([*compiler, *FLAGS, "-dM", "-E", "-x", "c", os.devnull])
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS)).encode() + known)
    folder = _cache()
    try:
        return _cached(compiler, folder, key.hexdigest()[:16])
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be used: {error}") from error


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oftfx"
    except RuntimeError as error:
        raise BuildError(f"there is no folder to keep them in: {error}") from error


def _cached(compiler: list[str], folder: Path, key: str) -> Path:
    for found in folder.glob(f"{key}-*.so"):
        # Loading a file that was cut short would end the process.
        if found.stem.partition("-")[2] == _digest(found):
            return found
        found.unlink(missing_ok=True)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        new = Path(scratch) / "kernels.so"
        _run([*compiler, *FLAGS, str(SOURCE), "-o", str(new)])
        # Moved at once: processes that build at the same time never read each other's half a file.
        return new.replace(folder / f"{key}-{_digest(new)}.so")


def _compiler() -> list[str]:
    if named := shlex.split(os.environ.get("CC", "")):
        return named
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C compiler found (cc, gcc or clang, or one named by $CC)")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        raise BuildError(f"{command[0]} failed: {said[0] if said else error}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
