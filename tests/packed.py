"""4-bit weights that the tests of `ops/` share."""

import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit

from oftfx.ops import Packed
from oftfx.sites.bitsandbytes import packed_of


def quantised(
    weight: torch.Tensor, quant_type: str = "nf4", block_size: int = 64, double: bool = False
) -> Packed:
    """A weight as bitsandbytes quantises it."""
    data, state = quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double, quant_type=quant_type
    )
    return packed_of(data, state)


def random_packed(
    out: int,
    width: int,
    quant_type: str = "nf4",
    block_size: int = 64,
    double: bool = False,
    device: str | torch.device = "cpu",
    storage: torch.dtype = torch.uint8,
) -> Packed:
    """Random bytes and scales, of any shape."""
    blocks = -(-out * width // block_size)
    data = torch.randint(256, (-(-out * width // 2),), dtype=torch.uint8, device=device)
    data = data.view(storage).unsqueeze(-1)
    code = get_4bit_type(quant_type, device=device)
    shape = (out, width)
    absmax = 0.5 + torch.rand(blocks, device=device)
    if not double:
        return Packed(data, absmax, code, shape, block_size)
    return Packed(
        data,
        torch.randint(256, (blocks,), dtype=torch.uint8, device=device),
        code,
        shape,
        block_size,
        0.01 + 0.1 * torch.rand(-(-blocks // 16), device=device),
        torch.linspace(-1, 1, 256, device=device),
        torch.tensor(0.7, device=device),
        16,
    )
