"""The C library, loaded once a process, and how its functions are called."""

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from oftfx.ops.native.build import BuildError, built

log = logging.getLogger("oftfx")

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64
# Operands and sizes; each then takes GOMP_parallel and a number of threads.
SIGNATURES = {
    "rotate": (*[POINTER] * 3, *[NUMBER] * 4),
    "rotate_grad": (*[POINTER] * 8, *[NUMBER] * 5),
    "fold": (*[POINTER] * 3, *[NUMBER] * 3),
    "fold_grad": (*[POINTER] * 4, *[NUMBER] * 3),
    "dequantise": (*[POINTER] * 8, *[NUMBER] * 5),
    "cayley": (*[POINTER] * 2, *[NUMBER] * 4),
    "cayley_grad": (*[POINTER] * 3, *[NUMBER] * 4),
}

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
    for name, arguments in SIGNATURES.items():
        getattr(loaded, f"oftfx_{name}").argtypes = (*arguments, POINTER, NUMBER)
    return loaded


def call(name: str, operations: int, *arguments: object) -> None:
    """Runs a function of the library on PyTorch's own threads.

    Raises:
        MemoryError: There was none for its scratch.
    """
    fork = _fork() if operations > ALONE else None
    threads = torch.get_num_threads() if fork else 1
    if getattr(library(), f"oftfx_{name}")(*arguments, fork, threads):
        raise MemoryError(f"oftfx::{name}: no memory for scratch space")


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """A C array of the tensors' addresses."""
    return (POINTER * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """A C array of integers."""
    return (NUMBER * len(values))(*values)


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
    return ctypes.cast(found, POINTER).value
