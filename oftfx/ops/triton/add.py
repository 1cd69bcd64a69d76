"""What the runs of a kernel found, added in their order: the same input gives the same bits."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from oftfx.ops.triton.launch import Launch
from oftfx.ops.triton.tiles import like


@triton.jit(do_not_specialize=["runs", "entries"])
def _add(
    source: tl.tensor,
    out_0: tl.tensor,
    out_1: tl.tensor,
    out_2: tl.tensor,
    runs: tl.tensor,
    entries: tl.tensor,
    COUNT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Source (runs, COUNT, entries) to COUNT tensors."""
    entry = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    for i in tl.static_range(COUNT):
        total = tl.full((SIZE,), 0.0, tl.float32)
        for start in range(0, runs, AT_ONCE):
            for run in tl.static_range(AT_ONCE):  # which wait for memory together
                slot = ((start + run) * COUNT + i) * entries.to(tl.int64)
                there = (start + run < runs) & (entry < entries)
                total += tl.load(source + slot + entry, there, 0.0)
        out = out_0 if i == 0 else out_1 if i == 1 else out_2
        tl.store(out + entry, total, entry < entries)


def added(source: Tensor, *outs: Tensor) -> None:
    """Fills ``outs``, up to three alike, with the sums of source (runs, len(outs), …), float32."""
    if outs[0].numel():
        _launch(source.shape[0], len(outs), outs[0].numel(), outs[0].dtype, outs[0].device)(
            source, *outs, *outs[-1:] * (3 - len(outs))
        )


def total(source: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of source (runs, …), float32, in a dtype."""
    if len(source) == 1:
        only = source[0]
        return only if only.dtype is dtype else only.to(dtype)
    out = torch.empty(source.shape[1:], dtype=dtype, device=source.device)
    added(source, out)
    return out


def totals(source: Tensor, those: list[Tensor]) -> list[Tensor]:
    """The sums of source (runs, len(those), …), float32, each like one of up to three tensors."""
    outs = [like(one) for one in those]
    added(source, *outs)
    return outs


@functools.lru_cache(maxsize=1024)
def _launch(
    runs: int, count: int, entries: int, dtype: torch.dtype, device: torch.device
) -> Launch:
    size = 256 if entries > 2**15 else 32
    at_once = min(16, triton.next_power_of_2(max(1, runs)))
    constants = (count, at_once, size)
    warps = size // 64 or 1
    return Launch(_add, triton.cdiv(entries, size), (runs, entries), constants, num_warps=warps)
