"""Native CPU kernels behind the semantic ops, one family a file, all of one small C library.

The library is built from `kernels.c` when a CPU tensor first meets an op, with the machine's C
compiler, and kept in the user's cache. Without a compiler, or with ``OFTFX_NATIVE=0`` in the
environment, the ops stay plain PyTorch.
"""

import functools
import importlib
from types import ModuleType

from oftfx.ops.native.binding import library

FAMILIES = (
    *("cayley", "cayley_each", "dequantise", "fold", "fold_grad", "glu_rotate"),
    *("rms_rotate", "rotate", "rotate_group", "rotate_product"),
)


@functools.cache
def kernels(family: str) -> ModuleType | None:
    """The kernels of one family for this CPU; None where PyTorch does the work."""
    if family not in FAMILIES or library() is None:
        return None
    return importlib.import_module(f"{__name__}.{family}")
