"""The kernels run in Triton's interpreter here, and on the device where there is one."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when a kernel's module is imported, so before any test module asks for one.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=[pytest.param("cuda:0", marks=pytest.mark.gpu) if HAS_GPU else "cpu"])
def device(request) -> torch.device:
    return torch.device(request.param)
