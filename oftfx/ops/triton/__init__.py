"""Triton kernels behind the semantic ops, one family a file.

They are imported when a CUDA tensor first meets an op. Without Triton, and on GPUs that it does not
serve, the ops stay plain PyTorch.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch


@functools.cache
def kernels(family: str, device: torch.device) -> ModuleType | None:
    """The kernels of one family for this GPU; None where PyTorch does the work."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return None  # no bf16 tensor cores, or none that split float32 products
    name = f"{__name__}.{family}"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)
