"""What the benchmarks share: how rows are compiled, and what a profiler counts."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.autograd import DeviceType

import oftfx
from oftfx.backend import oftfx as backend
from oftfx.modules import Adapted

How = Literal["layers", "whole"]


def compiled(model: nn.Module, how: How, mode: str | None = None) -> nn.Module:
    """The model compiled in place, oftfx's by its backend and any other by inductor.

    All rows alike: layer by layer, where one graph serves every layer, or whole.
    """
    torch._dynamo.reset()
    adapted = any(isinstance(module, Adapted) for module in model.modules())
    if how == "whole":  # by the function, which needs no installed entry point
        model.compile(backend=backend if adapted else "inductor", mode=mode)
    elif adapted:
        oftfx.compile(model, mode=mode)
    else:
        lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
        for layer in max(lists, key=len):
            layer.compile(mode=mode)
    return model


class Launched(NamedTuple):
    """What a profiler saw of one run on the GPU: kernels, and the milliseconds it was busy."""

    kernels: int
    milliseconds: float


def launched(run: Callable[[], object]) -> Launched:
    """What one run launches on the GPU; its copies and fills take time, too, but are no kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    count = sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)
    return Launched(count, sum(event.self_device_time_total for event in events) / 1000)
