"""Rotate x, or fold the weight: which of the two costs less.

In products of a row by every block of a core, 2·b operations a column of x: rotating takes
three for each of x's T rows (x, its gradient, the core's), folding one for each of W's ``out`` rows
and one for each of x's (the core's gradient), besides a division of each block's gradient by
the block, which costs about as much as 2·b rows do.

    rotate   3·T
    fold     out + T + 2·b                          so fold from  T = out/2 + b  on

That is where arithmetic decides, on a CPU. A GPU waits for bytes, and there one kernel rotates for
all readers of x and adds their gradients up besides, while a folded weight takes memory until
the backward: float weights are folded by passes and by merging only.
"""

import os
from collections.abc import Sequence

import torch

from oftfx.ops.kernels import kernels


def fold_from(
    outs: Sequence[int], block: int, dtype: torch.dtype, device: torch.device
) -> int | None:
    """The number of rows from which a layer's float weight is folded in a training step.

    ``OFTFX_FOLD=0`` in the environment folds none, ``OFTFX_FOLD=1`` all that an op can fold.

    Args:
        outs: How many outputs the layers have that read one x, each with a rotation of its own:
            they fold or rotate together, for together they rotate in one op. None of them where
            they share one, which is cheaper still.
        block: Width of the rotation's blocks.
        dtype: Of the matmul.
        device: Of x.

    Returns:
        None where it never is.
    """
    chosen = os.environ.get("OFTFX_FOLD")
    if not outs or chosen == "0":
        return None
    if chosen == "1":
        return 1
    fast = kernels("fold", device) if device.type == "cpu" else None
    if fast is None or not fast.fits(dtype, block):
        return None
    return -(-sum(outs) // (2 * len(outs))) + block


def folds_packed(rows: int, out: int, device: torch.device) -> bool:
    """Whether to turn a 4-bit weight, and not x: what there are fewer bytes of.

    On a GPU, those of W are read and written anyway.
    """
    return rows * (4 if device.type == "cuda" else 1) >= out
