"""bitsandbytes' `Linear4bit` (NF4, FP4, double quantisation or not) and `Linear8bitLt`."""

import copy
import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from oftfx.errors import OftfxWarning
from oftfx.ops.cost import folds_packed
from oftfx.ops.kernels import kernels
from oftfx.ops.packed import Packed
from oftfx.ops.rotated_linear import deferred_linear, packed_linear, rotated_linear
from oftfx.sites import gemm_4bit
from oftfx.sites.matmul import Layout
from oftfx.sites.naming import forward_of


class _Layer:
    """What both kinds of layers have in common."""

    CLASS: str
    LAYOUT: Layout = "out_in"
    REQUANTISES = True

    def owns(self, module: nn.Module) -> bool:
        """Whether the module multiplies as a layer of this kind does."""
        return forward_of(module) == f"{self.CLASS}.forward"

    def shape(self, module: Any) -> tuple[int, int]:
        """Shape of W: (out, in)."""
        return module.out_features, module.in_features

    def ends_gradient(self, module: nn.Module) -> bool:
        """Never: its autograd function has a gradient for its input."""
        return False


class Linear4bit(_Layer):
    """4-bit blocks, each with the largest of its absolute values, itself quantised or not."""

    KIND = "linear4bit"
    CLASS = "bitsandbytes.nn.modules.Linear4bit"
    DEFERS = True

    def fault(self, module: Any) -> str:
        """Why nothing can be trained through this layer as it is; empty when it can."""
        weight, state = module.weight, _state(module)
        if weight.device.type == "meta":
            return ""
        if state is None:
            return "it is not quantised yet, which moving it to a device does: model.to(device)"
        out, width = self.shape(module)
        if tuple(state.shape) != (out, width):
            return f"its quant state says {tuple(state.shape)}, the layer {(out, width)}"
        numbers = 2 * weight.numel() * weight.element_size()
        if numbers != out * width + out * width % 2:
            return f"its quantised weight holds {numbers} numbers, not {out}×{width}"
        blocks = -(-out * width // state.blocksize)
        if state.absmax.numel() != blocks:
            return f"its quant state scales {state.absmax.numel()} blocks, the weight has {blocks}"
        return ""

    def pin(self, module: Any) -> None:
        """Turns off the layout for inference on CPUs, which has no gradient.

        In evaluation bitsandbytes rewrites weight and quant state in place for it, rounds the
        scales to bfloat16 on the way, and a later training step would compute with the result.
        """
        _unpack(module)
        _warn_of_misreading(module)
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False

    def unpin(self, module: Any) -> None:
        """Lets the layer choose its layout again."""
        if "support_avx512bf16_for_cpu" in vars(module):
            from bitsandbytes.functional import has_avx512bf16

            module.support_avx512bf16_for_cpu = has_avx512bf16()

    def dequantise(self, module: Any) -> Tensor:
        """W as float32, (out, in)."""
        from bitsandbytes.functional import dequantize_4bit

        _unpack(module)
        state = copy.copy(_state(module))
        state.dtype = torch.float32  # its own would round once more
        return dequantize_4bit(module.weight.data, state)

    def requantise(self, module: Any, weight: Tensor) -> None:
        """Stores another W, (out, in), in the layer's own format."""
        from bitsandbytes.functional import quantize_4bit

        old, state = module.weight, _state(module)
        data, new = quantize_4bit(
            weight.to(state.dtype).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=old.dtype,
        )
        parameter = copy.copy(old)  # another object: the old one may be tied
        parameter.data, parameter.quant_state = data, new
        module._parameters["weight"], module.quant_state = parameter, new

    def fuses(
        self, module: Any, x: Tensor, dtype: torch.dtype, block: int | None, outs: tuple[int, ...]
    ) -> bool:
        """Where a kernel turns the weight while it dequantises it, as the layer does anyway.

        A layer that is the only reader of x leaves it to the op which of the two is turned.
        """
        fast, state = kernels("dequantise", x.device), _state(module)
        rows = x.numel() // max(1, x.shape[-1])
        if fast is None or state is None:
            return False
        if x.is_cuda:
            wide = block or 0
            if rows <= LEAST_ROWS or not folds_packed(rows, module.out_features, wide, x.device):
                return False
        elif not outs or (len(outs) > 1 and rows * len(outs) < sum(outs)):
            return False  # x is turned once for all, or is narrower than the weights together
        weight, computed = packed_of(module.weight.data, state), module.compute_dtype or dtype
        fits: bool = fast.fits(weight, block, computed)
        return fits

    def multiplied(self, module: Any, x: Tensor) -> Tensor | None:
        """With a gradient by another library, where that gains and a kernel dequantises."""
        fast = kernels("dequantise", x.device)
        if fast is None or _state(module) is None or module.compute_dtype not in (None, x.dtype):
            return None
        given, weight, bias = _operands(module, x)
        return packed_linear(given, weight, bias) if fast.fits(weight, None, x.dtype) else None

    def rotated_linear(self, module: Any, x: Tensor, core: Tensor | None, deferred: bool) -> Tensor:
        """The layer's output for ``x·blockdiag(I + C_1 … I + C_n)``, in the dtypes of its own."""
        given, weight, bias = _operands(module, x)
        if core is None:
            return packed_linear(given, weight, bias).to(x.dtype)
        multiply = deferred_linear if deferred else rotated_linear
        return multiply(given, core, weight, bias).to(x.dtype)


class Linear8bitLt(_Layer):
    """Rows of int8 with a scale each; the activation is quantised in inference too."""

    KIND = "linear8bit"
    CLASS = "bitsandbytes.nn.modules.Linear8bitLt"

    def fault(self, module: Any) -> str:
        """Why nothing can be trained through this layer as it is; empty when it can."""
        if module.weight.device.type == "meta":
            return ""
        if module.state.has_fp16_weights:
            return "it quantises float weights in every forward: build it has_fp16_weights=False"
        rows, scales = _rows(module)
        if rows is None or scales is None or rows.dtype is not torch.int8:
            return "it is not quantised yet, which moving it to a device does: model.to(device)"
        out, width = self.shape(module)
        if tuple(rows.shape) != (out, width) or scales.numel() != out:
            return (
                f"it holds {tuple(rows.shape)} with {scales.numel()} scales, the layer is "
                f"{(out, width)}"
            )
        return ""

    def pin(self, module: nn.Module) -> None:
        """Nothing to do: the rows stay as they are."""

    def unpin(self, module: nn.Module) -> None:
        """Nothing to do."""

    def dequantise(self, module: Any) -> Tensor:
        """W as float32, (out, in)."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        rows, scales = _rows(module)
        return int8_vectorwise_dequant(rows, scales)

    def requantise(self, module: Any, weight: Tensor) -> None:
        """Stores another W, (out, in), in the layer's own format."""
        from bitsandbytes.functional import int8_vectorwise_quant

        rows, scales, _ = int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        old = module.weight
        module._parameters["weight"] = type(old)(
            rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales
        )
        module.state.CB = module.state.SCB = None  # the next forward takes the weight's


LEAST_ROWS = 1536
"""Up to so many rows a GPU may multiply by the bytes themselves (0.50), to other bits."""
LINEAR4BIT = Linear4bit()
LINEAR8BIT = Linear8bitLt()


OPS = (
    gemm_4bit.NAME,
    "bitsandbytes.dequantize_4bit.default",  # before 0.50, with a matmul of torch's after it
    "bitsandbytes.dequantize_blockwise.default",
)
"""Ops that read a 4-bit weight, as graphs name them."""


def repacked_by(reader: str) -> str:
    """Why a weight cannot be rotated that a graph's node, so described, rewrites; else empty."""
    if not reader.startswith("`set_."):
        return ""
    return (
        f"rewritten by {reader}, as bitsandbytes does in evaluation on CPUs with AVX512-BF16: "
        "export the model in training mode"
    )


def _operands(module: Any, x: Tensor) -> tuple[Tensor, Packed, Tensor | None]:
    """x, W and the bias, as the layer multiplies them; its first call settles in which dtype."""
    if not module.compute_type_is_set:
        module.set_compute_type(x)
        module.compute_type_is_set = True
    given = x if module.compute_dtype is None else x.to(module.compute_dtype)
    bias = None if module.bias is None else module.bias.to(given.dtype)
    return given, packed_of(module.weight.data, _state(module)), bias


def _state(module: Any) -> Any:
    """The quant state, which a conversion of the parameter may have left with the module alone."""
    state = getattr(module.weight, "quant_state", None)
    return module.quant_state if state is None else state


def packed_of(data: Tensor, state: Any) -> Packed:
    """A weight's bytes and its quant state, as the ops take them."""
    nested = (None, None, None, 256)
    if state.nested:
        inner = state.state2
        nested = (inner.absmax, inner.code, state.offset, inner.blocksize)
    return Packed(data, state.absmax, state.code, tuple(state.shape), state.blocksize, *nested)


def _unpack(module: Any) -> None:
    """Undoes the layout for inference on CPUs, as far as its bfloat16 scales allow."""
    state = _state(module)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales = state.absmax
    module.weight.data, state = _convert_weight_packed_for_cpu_inverse(module.weight.data, state)
    if not state.nested:  # scales that were not quantised it leaves as that layout has them
        state.absmax = scales.T.float().reshape(-1)
    module.weight.quant_state = module.quant_state = state


def _warn_of_misreading(module: Any) -> None:
    """Tells where bitsandbytes itself computes with another weight than was quantised."""
    block_size = 0 if (state := _state(module)) is None else state.blocksize
    if module.weight.device.type != "cpu" or not block_size or not module.in_features % block_size:
        return
    if _cpu_misreads():
        warnings.warn(
            f"this version of bitsandbytes misreads 4-bit weights on the CPU whose width "
            f"{module.in_features} is no multiple of their block size {block_size}: the base model "
            "itself computes with wrong weights there. Use another block size or a GPU.",
            OftfxWarning,
            stacklevel=2,
        )


@functools.cache
def _cpu_misreads() -> bool:
    """Whether blocks that span rows come back from a CPU as other numbers."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.tensor([1.0, 2.0, 4.0]).repeat_interleave(64).reshape(2, 96)
    data, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return not torch.equal(dequantize_4bit(data, state), weight)


def _rows(module: Any) -> tuple[Any, Any]:
    """The int8 rows and their scales: the parameter has them until the first forward."""
    holder = module.weight if module.weight.CB is not None else module.state
    return holder.CB, holder.SCB
