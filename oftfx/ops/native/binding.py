"""The C library, loaded once a process, and how its functions are called."""

import ctypes
import functools
import logging
import os
import sys
from array import array
from typing import Any

import torch

from oftfx.ops.native.build import BuildError, built

log = logging.getLogger("oftfx")

FUNCTIONS = (
    *("rotate", "rotate_grad", "glu_rotate", "glu_rotate_grad", "fold", "fold_grad"),
    *("dequantise", "cayley", "cayley_grad"),
)

ALONE = 1 << 20
"""Floating-point operations below which waking other threads costs more than they save."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built library; None where there is none, which is logged once."""
    if os.environ.get("OFTFX_NATIVE") == "0":
        log.info("CPU kernels are off (OFTFX_NATIVE=0): PyTorch does their work")
        return None
    try:
        if sys.platform != "linux":
            raise BuildError(f"they are built on Linux only, not on {sys.platform}")
        loaded = ctypes.CDLL(str(built()))
    except (BuildError, OSError) as error:
        log.warning("no CPU kernels, PyTorch does their work, correctly but slower: %s", error)
        return None
    for name in FUNCTIONS:
        # Numbers, then GOMP_parallel and how many threads.
        operands = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        getattr(loaded, f"oftfx_{name}").argtypes = operands
    return loaded


def call(name: str, operations: int, *numbers: int) -> None:
    """Runs a function of the library on PyTorch's own threads.

    Args:
        name: Of the function, without its prefix.
        operations: Floating-point operations, about.
        numbers: The sizes and addresses that it takes, which their owner keeps.

    Raises:
        MemoryError: There was none for its scratch.
    """
    fork = _fork() if operations > ALONE else None
    threads = torch.get_num_threads() if fork else 1
    given = array("q", numbers)
    if _function(name)(given.buffer_info()[0], fork, threads):
        raise MemoryError(f"oftfx::{name}: no memory for scratch space")


@functools.cache
def _function(name: str) -> Any:
    return getattr(library(), f"oftfx_{name}")


@functools.cache
def _fork() -> int | None:
    """The address of GOMP_parallel in the OpenMP that PyTorch has loaded.

    A second OpenMP would have threads of its own, and both wait by spinning: on the same cores they
    would fight. None where PyTorch uses another kind; one thread then does the work.
    """
    try:
        found = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(found, ctypes.c_void_p).value
