"""Ops are differentiable to any order, by the formulas of their gradients."""

import pytest
import torch

from oftfx.lower import ATEN
from oftfx.ops.givens import GIVENS
from oftfx.ops.rotate import ROTATE
from oftfx.ops.subspace import SUBSPACE

SHAPES = {ROTATE: [(3, 2, 2)], GIVENS: [(5, 2, 2)], SUBSPACE: [(2, 6), (2, 2)]}


@pytest.mark.parametrize("op", SHAPES, ids=str)
def test_three_times(op):
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((4, 6), *SHAPES[op])
    ]

    def derivatives(function):
        values = [function(*leaves)]
        for _ in range(3):
            total = sum((value.sin() * value).sum() for value in values)
            values = torch.autograd.grad(total, leaves, create_graph=True)
        return values

    torch.testing.assert_close(derivatives(op), derivatives(ATEN[op]))
