"""4-bit weights as bitsandbytes stores them: NF4 and FP4, their scales quantised or not."""

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """A weight (out, in) of two numbers a byte, in blocks along its rows laid end to end.

    Number j of the weight is ``code[its 4 bits] · scale[j // block_size]``. The scales are
    ``absmax`` or, where that is quantised too, ``nested_code[absmax] · nested_absmax + offset``.

    Attributes:
        data: The bytes, stored as any dtype; the first number of a byte is its high half.
        absmax: (blocks,), float32; uint8 where it is quantised.
        code: (16,), float32.
        shape: Of the weight: (out, in).
        block_size: Numbers that have one scale.
        nested_absmax: (blocks of scales,), float32.
        nested_code: (256,), float32.
        offset: (), float32.
        nested_block_size: Scales that have one scale themselves.
    """

    data: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, int]
    block_size: int
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    nested_block_size: int = 256


def dequantised(weight: Packed, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) as bitsandbytes computes it: in float32, then rounded to ``dtype``."""
    out, width = weight.shape
    count = out * width
    pairs = weight.data.reshape(-1).view(torch.uint8)
    numbers = torch.stack((pairs >> 4, pairs & 15), -1).flatten()[:count]
    value = weight.code[numbers.int()] * _each(scales(weight), weight.block_size, count)
    return value.to(dtype).view(out, width)


def scales(weight: Packed) -> Tensor:
    """The scale of every block, (blocks,), float32."""
    absmax, nested, code = weight.absmax, weight.nested_absmax, weight.nested_code
    if nested is None or code is None or weight.offset is None:
        return absmax
    return code[absmax.int()] * _each(nested, weight.nested_block_size, absmax.numel()) + (
        weight.offset
    )


def _each(scale: Tensor, block_size: int, count: int) -> Tensor:
    """A block's scale for each of its numbers."""
    return scale.repeat_interleave(block_size)[:count]
