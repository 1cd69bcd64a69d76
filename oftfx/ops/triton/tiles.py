"""How a problem is cut into programs: what every kernel over rows of activations shares."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from oftfx.ops.triton.launch import Launch

START = 1.5
"""What a program takes to begin, its core to load and its Gram to store, in tiles."""
SHORT = 2
"""Tiles in a short run."""


class Tiles(NamedTuple):
    """The kernel's choices for a block size.

    Attributes:
        pack: Blocks in a pack.
        wide: Columns of a pack, padded to a power of two.
        part: How many of those columns one program writes.
        tile: Rows at a time.
        warps: Warps of a program.
        stages: Tiles in flight; 0 for one, kept in registers.
        waves: Programs at work at a time on one processor, which cut the rows into as many runs as
            are at work together; 0 for short runs, whose programs follow each other as they end.
    """

    pack: int
    wide: int
    part: int
    tile: int
    warps: int
    stages: int
    waves: int


class Work(NamedTuple):
    """One problem cut into programs.

    Attributes:
        launch: Runs them.
        splits: Into how many runs the rows are cut.
    """

    launch: Launch
    splits: int


def cut(
    rows: int, n: int, chosen: Tiles, device: torch.device, stride: int
) -> tuple[int, int, int]:
    """How many programs, tiles of rows in the run of each, and runs.

    Args:
        rows: Of the activation.
        n: Blocks.
        chosen: The tiles.
        device: Where.
        stride: The longest between rows.
    """
    columns = triton.cdiv(n, chosen.pack) * (chosen.wide // chosen.part)
    height = triton.cdiv(rows, chosen.tile)
    most_tiles = longest(chosen.tile, stride)
    if chosen.waves:
        run = _together(columns, height, chosen.waves * processors(device), most_tiles)
    else:
        run = max(1, min(SHORT, most_tiles, columns * height // processors(device)))
    splits = max(1, triton.cdiv(height, run))
    return columns * splits, run, splits


def _together(columns: int, height: int, at_once: int, most_tiles: int) -> int:
    """How many tiles are in a run, where as many programs as are at work begin and end together."""

    def time(run: int) -> float:
        """In tiles: programs begin together, those there is no room for when others have ended."""
        return triton.cdiv(columns * triton.cdiv(height, run), at_once) * (run + START)

    most = max(1, 8 * at_once // max(1, columns))
    runs = {max(1, min(most_tiles, triton.cdiv(height, parts))) for parts in range(1, most + 1)}
    return min(sorted(runs), key=time)


def longest(tile: int, stride: int) -> int:
    """How many tiles of rows a run may have: as many as 32 bits count, with the longest stride."""
    return max(1, (2**31 - 1) // (tile * max(1, stride)))


def layout(n: int, b: int, chosen: Tiles) -> tuple[int, ...]:
    """The kernels' constants B, PACK, WIDE, PART, TILE and EVEN."""
    pack, wide, part, tile, *_ = chosen
    return b, pack, wide, part, tile, pack * b == wide and n % pack == 0


def options(chosen: Tiles) -> dict[str, int]:
    """What Triton compiles with."""
    return {"num_warps": chosen.warps, "num_stages": max(chosen.stages, 1)}


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Rows of neighbouring columns and their stride; a copy only where x has no such view."""
    width = x.shape[-1]
    if x.is_contiguous():
        return x, width
    x = x.reshape(-1, width)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def uniform(tensors: Sequence[Tensor], dtype: torch.dtype, shape: torch.Size | None = None) -> bool:
    """Whether all have this dtype, and this shape if one is given.

    A loop, since a generator costs more than all it would look at.
    """
    for tensor in tensors:
        if tensor.dtype is not dtype or (shape is not None and tensor.shape != shape):
            return False
    return True


def like(x: Tensor, dtype: torch.dtype | None = None, wanted: bool = True) -> Tensor:
    """An empty tensor of x's shape and device, contiguous; of no elements where none is wanted.

    In half the time of `torch.empty`, which reads the shape and the device from Python.
    """
    if not wanted:
        return x.new_empty(0, dtype=dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def processors(device: torch.device) -> int:
    """How many work side by side."""
    if device.type != "cuda":  # the interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def three(tensors: list[Tensor]) -> list[Tensor]:
    """With the last one again where there are fewer: kernels skip it."""
    return [*tensors, *tensors[-1:] * (3 - len(tensors))]


def rows_alike(grads: list[Tensor]) -> tuple[list[Tensor], int]:
    """As `rows_of` gives each, of one stride."""
    rows = [rows_of(grad) for grad in grads]
    if any(stride != rows[0][1] for _, stride in rows):
        rows = [rows_of(grad.contiguous()) for grad in grads]
    return [grad for grad, _ in rows], rows[0][1]


def alike(cores: list[Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
    """The cores, of one set of strides, and those."""
    strides = cores[0].stride()
    if any(core.stride() != strides for core in cores):
        cores = [core.contiguous() for core in cores]
        strides = cores[0].stride()
    return cores, strides
