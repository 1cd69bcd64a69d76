"""Which kernels an op runs: Triton's on a GPU, native code on a CPU, PyTorch where neither fits."""

import functools
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch

from oftfx.ops import native, triton

_NOWHERE: AbstractContextManager[None] = nullcontext()


@functools.cache
def kernels(family: str, device: torch.device) -> ModuleType | None:
    """The kernels of one family for this device; None where PyTorch does the work.

    Each has a ``fits`` that says which operands it takes.
    """
    if device.type == "cuda":
        return triton.kernels(family, device)
    if device.type == "cpu":
        return native.kernels(family)
    return None


def on(device: torch.device) -> AbstractContextManager[object]:
    """Within it, this GPU is the one that kernels are launched on."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _NOWHERE  # which every launch of a small model would pay for
    return torch.cuda.device(device)
