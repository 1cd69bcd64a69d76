"""Products of float32 matrices on tensor cores, which multiply shorter numbers.

A matrix is split into what is left of it in few digits and the rest, once for all the products that
it is in. Triton's own ways of doing so (`input_precision`) split it for each product anew, and ask
of each number whether it is finite: twice the instructions.
"""

import torch
import triton
import triton.language as tl

from oftfx.ops.triton.blocks import COMPILED

EXACT = "tf32x3"
"""The parts whose products are as exact as float32's own."""

FAST = "bf16x3" if COMPILED else EXACT
"""Those that lose some 10⁻⁶ of a product, and half the time; the interpreter multiplies none."""

ROUNDED = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""One part, in a dtype of 16 bits."""


@triton.jit
def parts(x: tl.tensor, KIND: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """A float32 matrix as the sum of two; of a dtype of 16 bits, rounded, twice the same."""
    if KIND == "tf32x3":
        high = (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        low = x - high
    elif KIND == "bf16x3":
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
    elif KIND == "bf16":
        high = x.to(tl.bfloat16)
        low = high
    else:
        tl.static_assert(KIND == "fp16")
        high = x.to(tl.float16)
        low = high
    return high, low


@triton.jit
def product(a: tl.tuple, b: tl.tuple, total: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """``total + a·b`` in float32, of matrices in parts; without the product of both rests."""
    if KIND == "tf32x3" or KIND == "bf16x3":
        total = tl.dot(a[1], b[0], total, input_precision="tf32")
        total = tl.dot(a[0], b[1], total, input_precision="tf32")
    return tl.dot(a[0], b[0], total, input_precision="tf32")
