"""What linear layers that turn their weight have in common, be it of floats or of 4 bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from oftfx.ops.kept import again
from oftfx.ops.kernels import kernels, on
from oftfx.ops.rotate import rotate, rotate_grad
from oftfx.ops.rotate_product import rotate_product_grad


def folded(weight: Tensor, core: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """``W blockdiag(I + C_1 … I + C_n)ᵀ`` as merging computes it: in the wider dtype, then rounded.

    Args:
        weight: W, (out, n·b), floating.
        core: (n, b, b), the residual blocks; a single one, (1, b, b), turns every block.
        dtype: Of the result.
        into: Where it goes, of that dtype; perhaps the weight itself. None for a new tensor.

    Returns:
        (out, n·b), a new one contiguous.
    """
    fast = kernels("fold", weight.device)
    if fast is not None and fast.fits(weight, core):
        with on(weight.device):
            result: Tensor = fast.folded(weight, core, dtype, into)
        return result
    wide = weight.to(torch.promote_types(weight.dtype, core.dtype))
    turned = rotate(wide, core.mT)
    return turned.to(dtype) if into is None else into.copy_(turned)


def core_grad(grad: Tensor, x: Tensor, core: Tensor, by: Sequence[Tensor] = ()) -> Tensor:
    """The core's gradient of ``x W̃ᵀ``, from that of x: no pass but one over what both are.

    ``d(x·M) = dx M⁻ᵀ``, so ``dC_i = x_iᵀ d(x·M)_i = (x_iᵀ dx_i) M_i⁻ᵀ``.

    Args:
        grad: (..., n·b), the gradient of x.
        x: (..., n·b), or the first of its factors.
        core: (n, b, b).
        by: Its other factors, as they were kept.

    Returns:
        (n, b, b) in the core's dtype.
    """
    factors = [x, *by]
    fast = kernels("fold_grad", x.device)
    if fast is not None and fast.fits(x.dtype, core.shape[-1]):
        result: Tensor = fast.core_grad(grad, again(factors), core)
        return result
    _, gram = kept_grad(grad, factors, core, need_x=False, need_core=True)
    return _divided(gram, core.to(x.dtype))


def kept_grad(
    grad: Tensor, factors: list[Tensor], core: Tensor, need_x: bool, need_core: bool
) -> tuple[Tensor, Tensor]:
    """[`rotate_grad`][oftfx.ops.rotate_grad] of what was kept of x: itself, or its factors."""
    if len(factors) == 1:
        return rotate_grad(grad, factors[0], core, need_x, need_core)
    grad_x, (grad_core,) = rotate_product_grad([grad], factors, [core], need_x, need_core)
    return grad_x, grad_core


def _divided(gram: Tensor, core: Tensor) -> Tensor:
    """``gram_i (I + C_i)⁻ᵀ``, exact for a truncated series too, whose R is not quite orthogonal."""
    fast = kernels("divide", gram.device)
    if fast is not None and fast.fits(gram, core):
        with on(gram.device):
            result: Tensor = fast.divided(gram, core)
        return result
    dtype = torch.promote_types(gram.dtype, torch.float32)
    turn = core.to(dtype) + torch.eye(core.shape[-1], dtype=dtype, device=core.device)
    # The variant that does not wait for the device to tell of singular blocks.
    quotient, _ = torch.linalg.solve_ex(turn.mT, gram.to(dtype), left=False)
    return quotient.to(gram.dtype)


def fits(x: Tensor, core: Tensor, shape: Sequence[int]) -> bool:
    """Whether an x, a core and a weight of this shape belong together."""
    n, b, c = core.shape
    width = x.shape[-1]
    return b == c and width == shape[1] and (width == n * b or (n == 1 and width % b == 0))


def misfit(op: str, x: Tensor, core: Tensor, shape: Sequence[int]) -> str:
    """What to say where they do not."""
    return (
        f"oftfx::{op}: x of shape {tuple(x.shape)}, a core of shape {tuple(core.shape)} and a "
        f"weight of shape {tuple(shape)} do not fit: the last axis of x must be the weight's, and "
        "the number of blocks times their width."
    )
