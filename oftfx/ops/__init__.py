"""The semantic ops, `torch.ops.oftfx.*`: what a rotation is, in eager, exported and compiled."""

from oftfx.ops.cayley import cayley, cayley_grad
from oftfx.ops.cayley_each import cayley_each, cayley_each_grad
from oftfx.ops.folded_linear import folded_linear
from oftfx.ops.givens import givens, givens_grad
from oftfx.ops.glu_rotate import glu_rotate, glu_rotate_grad
from oftfx.ops.int8_linear import int8_linear
from oftfx.ops.norm_rotate import Norm, norm_rotate, norm_rotate_grad
from oftfx.ops.packed import Packed
from oftfx.ops.parameters import reflections, spectral_norm
from oftfx.ops.rms_rotate import rms_rotate_grad
from oftfx.ops.rotate import block_gram, rotate, rotate_grad
from oftfx.ops.rotate_group import rotate_group, rotate_group_grad
from oftfx.ops.rotate_product import rotate_product_grad
from oftfx.ops.rotated_linear import (
    defer,
    deferred_linear,
    packed_linear,
    rotated_linear,
    rotated_linear_grad,
)
from oftfx.ops.rounded_cayley import rounded_cayley, rounded_cayley_grad
from oftfx.ops.scale import scale
from oftfx.ops.subspace import subspace, subspace_grad

__all__ = [
    "Norm",
    "Packed",
    "block_gram",
    "cayley",
    "cayley_each",
    "cayley_each_grad",
    "cayley_grad",
    "defer",
    "deferred_linear",
    "folded_linear",
    "givens",
    "givens_grad",
    "glu_rotate",
    "glu_rotate_grad",
    "int8_linear",
    "norm_rotate",
    "norm_rotate_grad",
    "packed_linear",
    "reflections",
    "rms_rotate_grad",
    "rotate",
    "rotate_grad",
    "rotate_group",
    "rotate_group_grad",
    "rotate_product_grad",
    "rotated_linear",
    "rotated_linear_grad",
    "rounded_cayley",
    "rounded_cayley_grad",
    "scale",
    "spectral_norm",
    "subspace",
    "subspace_grad",
]
