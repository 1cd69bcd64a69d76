"""bitsandbytes' 4-bit matmul as a node of a graph, `gemm_4bit(x, W packed, its shape, …)`.

y = gemm_4bit(x, packed, (out, in), absmax, 64, "nf4", bias)        y = linear(x, W, bias)
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

NAME = "bitsandbytes.gemm_4bit.default"
UNPACKING = "bitsandbytes.dequantize_4bit.default"


class Operands(NamedTuple):
    """What the op takes, in its own order; nodes or their values.

    Attributes:
        A: x, (…, in).
        B: W packed, two numbers a byte.
        shapeB: (out, in).
        absmax: The scale of each block; where scales are quantised, that of each block of scales.
        blocksize: Numbers that share a scale.
        quant_type: "nf4" or "fp4".
        bias: (out,).
        absmax_8bit: The quantised scales.
        absmax_code: What the 256 values of a quantised scale stand for.
        absmax_offset: What was taken off the scales before they were quantised.
    """

    A: Any
    B: Any
    shapeB: Any  # noqa: N815  (the op's own names)
    absmax: Any
    blocksize: int
    quant_type: str
    bias: Any = None
    absmax_8bit: Any = None
    absmax_code: Any = None
    absmax_offset: Any = None

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of the operands that W is stored in."""
        return ("B", "absmax", "absmax_8bit", "absmax_code", "absmax_offset")

    def scales(self) -> Tensor:
        """The scale of each block, float32."""
        if self.absmax_8bit is None:
            scales: Tensor = self.absmax
            return scales
        dequantise = torch.ops.bitsandbytes.dequantize_blockwise
        return self.absmax_offset + dequantise(
            self.absmax_8bit, self.absmax, self.absmax_code, 256, torch.float32
        )

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W, (out, in), as the library reads it."""
        # Not by `ops.packed`, which reads what was quantised: on a CPU some versions of the library
        # read other scales where a block spans two rows, and so does the op this stands for.
        return torch.ops.bitsandbytes.dequantize_4bit(
            self.B, self.scales(), self.blocksize, self.quant_type, list(self.shapeB), dtype
        )

    def requantised(self, weight: Tensor) -> dict[str, Tensor]:
        """What the op takes to multiply by another W, (out, in), by the operands' names."""
        from bitsandbytes.functional import quantize_4bit

        data, state = quantize_4bit(
            weight.contiguous(),
            blocksize=self.blocksize,
            compress_statistics=self.absmax_8bit is not None,
            quant_type=self.quant_type,
            quant_storage=self.B.dtype,
        )
        fresh = {"B": data.view(self.B.shape), "absmax": state.absmax}
        if state.nested:
            fresh |= {
                "absmax": state.state2.absmax,
                "absmax_8bit": state.absmax,
                "absmax_code": state.state2.code,
                "absmax_offset": state.offset,
            }
        return fresh


def of_two(x: fx.Node | None, unpacked: fx.Node, bias: fx.Node | None) -> Operands:
    """What a matmul takes that reads what another node has unpacked, as before 0.50.

    Args:
        x: What is multiplied.
        unpacked: ``dequantize_4bit(packed, scales, block size, quant type, shape, dtype)``, where
            quantised scales are ``dequantize_blockwise(absmax_8bit, absmax, code, …) + offset``.
        bias: What is added.
    """
    packed, scales, blocksize, quant_type, shape, *_ = unpacked.args
    given = Operands(x, packed, shape, scales, blocksize, quant_type, bias)  # type: ignore[arg-type]
    if not isinstance(scales, fx.Node) or len(scales.all_input_nodes) < 2:
        return given
    unscaled, offset = scales.all_input_nodes
    quantised, absmax, code = unscaled.all_input_nodes
    return given._replace(
        absmax=absmax, absmax_8bit=quantised, absmax_code=code, absmax_offset=offset
    )


@functools.cache
def register_gradients() -> None:
    """Gives the op its gradient for x and the bias; in modules an autograd function has it."""
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):  # since 0.50
        torch.library.register_autograd(
            "bitsandbytes::gemm_4bit", _backward, setup_context=_context
        )


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = Operands(*inputs)
    ctx.save_for_backward(*(getattr(given, name) for name in given.stored))
    nothing: dict[str, Any] = dict.fromkeys(("A", "bias", *given.stored))
    ctx.rest = given._replace(**nothing)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.rest._replace(**dict(zip(ctx.rest.stored, ctx.saved_tensors, strict=True)))
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if ctx.needs_input_grad[0]:
        grads[0] = grad @ given.weight(grad.dtype)
    if any(ctx.needs_input_grad[6:]):
        grads[6] = grad.flatten(0, -2).sum(0)
    return tuple(grads)
