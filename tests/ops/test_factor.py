"""Factors: the ops that map x, with their operands."""

import torch

from oftfx.ops import factor
from oftfx.ops.factor import Factor, defects

ROTATE, SUBSPACE = torch.ops.oftfx.rotate.default, torch.ops.oftfx.subspace.default


def some_factors() -> list[Factor]:
    """Of two ops and several shapes, in turns."""
    cores = [0.1 * torch.randn(n, b, b, dtype=torch.float64) for n, b in ((3, 4), (2, 8)) * 3]
    supports = [torch.linalg.qr(torch.randn(8, 2, dtype=torch.float64)).Q.mT for _ in cores]
    kernels = [0.1 * torch.randn(2, 2, dtype=torch.float64) for _ in cores]
    rotations = [Factor(ROTATE, (core,)) for core in cores]
    subspaces = [Factor(SUBSPACE, pair) for pair in zip(supports, kernels, strict=True)]
    return [each for pair in zip(rotations, subspaces, strict=True) for each in pair]


def test_a_rotations_defect_is_that_of_its_worst_block():
    core = 0.3 * torch.randn(5, 6, 6, dtype=torch.float64)
    r = core + torch.eye(6, dtype=torch.float64)
    worst = torch.linalg.matrix_norm(r.mT @ r - torch.eye(6, dtype=torch.float64), ord=2).max()
    torch.testing.assert_close(Factor(ROTATE, (core,)).defect(), worst, rtol=1e-9, atol=0)


def test_many_defects_are_those_of_each(monkeypatch):
    factors = some_factors()
    each = torch.stack([one.defect() for one in factors])
    torch.testing.assert_close(torch.stack(defects(factors)), each, rtol=1e-12, atol=0)
    monkeypatch.setattr(factor, "AT_ONCE", 1)
    torch.testing.assert_close(torch.stack(defects(factors)), each, rtol=1e-12, atol=0)
    assert defects([]) == []
