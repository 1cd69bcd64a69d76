"""Rotate x, or fold the weight: which of the two costs less.

In products of a row by every block of a core, 2·b operations a column of x: rotating takes three
for each of x's T rows (x, its gradient, the core's), folding one for each of W's ``out`` rows and
one for each of x's (the core's gradient). By arithmetic alone folding would win from T = out/2 on.
But a rotated x is in the cache when it is multiplied; a folded weight is written to memory, kept
until the backward and read twice: on a CPU both were measured to cost the same between T = out
and T = 1.5·out, so

    fold from  T = 2·out  on.

An eager layer behind a norm or a gated product rotates all the same: the backward of a rotation
goes on through those (`oftfx.through`), which takes less time, and no memory for folded weights.

A GPU waits for bytes: there one kernel rotates for all readers of x and adds their gradients up
besides, and what is folded would take as much memory as the whole model does. Float weights are not
folded there, unless that is asked for.
"""

import functools
import os

import torch

from oftfx.ops.kernels import kernels

ALL = 1
"""The number of rows from which to fold where all are to be folded."""

DIVIDED = 64
"""The widest block by which a GPU divides a Gram matrix in one launch."""


@functools.cache
def fold_from(
    outs: tuple[int, ...], block: int, dtype: torch.dtype, device: torch.device
) -> int | None:
    """The number of rows from which a layer's float weight is folded in a training step.

    ``OFTFX_FOLD=0`` in the environment folds none, ``OFTFX_FOLD=1`` all that the op takes.

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
        return ALL
    fast = kernels("fold_grad", device) if device.type == "cpu" else None
    if fast is None or not fast.fits(dtype, block):
        return None
    return 2 * sum(outs) // len(outs)


def folds_packed(rows: int, out: int, block: int, device: torch.device) -> bool:
    """Whether to turn a 4-bit weight, and not x: what costs less.

    On a GPU, W is read and written anyway, and turning it on the way takes next to nothing; but not
    by blocks whose Gram matrices are divided there by factoring the cores, in many launches.
    """
    if device.type == "cuda":
        return block <= DIVIDED and rows * 16 >= out
    return rows >= out
