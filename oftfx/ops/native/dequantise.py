"""4-bit weights to floats, turned on the way while they are in the cache."""

import torch
from torch import Tensor

from oftfx.ops.native.binding import call
from oftfx.ops.native.rotate_group import LARGEST, STEP
from oftfx.ops.packed import Packed


def fits(weight: Packed, block: int | None, dtype: torch.dtype) -> bool:
    """Whether the kernels take these: to float32, and blocks of a width that pays.

    Scales must not go on from row to row: on CPUs bitsandbytes reads such weights otherwise.

    Args:
        weight: The weight.
        block: Width of the rotation's blocks; None for none.
        dtype: Of the floats.
    """
    stored = torch.float32 if weight.nested_absmax is None else torch.uint8
    return (
        dtype == torch.float32
        and weight.absmax.dtype == stored
        and weight.shape[1] % weight.block_size == 0
        and weight.block_size % 2 == 0
        and (block is None or (block % STEP == 0 and block <= LARGEST))
    )


def folded(weight: Packed, core: Tensor, dtype: torch.dtype) -> Tensor:
    """``W blockdiag(I + C_1 … I + C_n)ᵀ``, (out, n·b), float32."""
    n, b, _ = core.shape
    return _run(weight, core.to(dtype).contiguous(), n, b)


def dequantised(weight: Packed, dtype: torch.dtype) -> Tensor:
    """W, (out, in), float32."""
    return _run(weight, None, 1, weight.shape[1])


def _run(weight: Packed, core: Tensor | None, n: int, b: int) -> Tensor:
    rows = weight.shape[0]
    out = torch.empty(rows, n * b, dtype=torch.float32, device=weight.data.device)
    operands = (
        core,
        out,
        weight.data,
        weight.absmax,
        weight.code,
        weight.nested_absmax,
        weight.nested_code,
        weight.offset,
    )
    held = [None if tensor is None else tensor.contiguous() for tensor in operands]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in held]
    operations = 2 * rows * n * b * (1 if core is None else b)
    sizes = weight.block_size, weight.nested_block_size
    call("dequantise", operations, rows, n, b, *addresses, *sizes)
    return out
