"""HRA: the compact form is the product of reflections, and equal pairs are nothing at all."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oftfx import HRA
from oftfx.rotations import hra


def compact(u: torch.Tensor) -> torch.Tensor:
    spec = HRA(rank=u.shape[0])
    (factor,) = hra.factors(hra.cores({"u": u}, spec), spec)
    return factor(torch.eye(u.shape[1], dtype=u.dtype))


def sequential(u: torch.Tensor) -> torch.Tensor:
    matrix = torch.eye(u.shape[1], dtype=u.dtype)
    for row in u:
        unit = row / row.norm()
        matrix = matrix - 2 * (matrix @ unit)[:, None] * unit
    return matrix


ranks = st.sampled_from((2, 4, 6, 8))


@given(d=st.integers(8, 24), rank=ranks, seed=st.integers(0, 2**16))
def test_compact_is_sequential(d, rank, seed):
    torch.manual_seed(seed)
    u = torch.randn(rank, d, dtype=torch.float64)
    torch.testing.assert_close(compact(u), sequential(u), rtol=0, atol=1e-12)


@given(d=st.integers(8, 24), rank=ranks, apart=st.floats(1e-9, 0.1), seed=st.integers(0, 2**16))
def test_compact_is_sequential_for_pairs_that_are_nearly_equal(d, rank, apart, seed):
    """As they are early in training, where 1 − ⟨u, w⟩ has no digits left."""
    torch.manual_seed(seed)
    u = torch.randn(rank // 2, d, dtype=torch.float64).repeat_interleave(2, 0)
    u = u + apart * torch.randn(rank, d, dtype=torch.float64)
    moved = compact(u) - torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(
        moved, sequential(u) - torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert moved.norm() > apart / 10


@given(d=st.integers(8, 24), rank=ranks, seed=st.integers(0, 2**16))
def test_is_a_rotation(d, rank, seed):
    torch.manual_seed(seed)
    matrix = compact(torch.randn(rank, d, dtype=torch.float64))
    eye = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(matrix.mT @ matrix, eye, rtol=0, atol=1e-12)
    assert torch.linalg.det(matrix).item() == pytest.approx(1)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [8, 100, 1023])
def test_equal_pairs_are_the_identity_to_the_last_bit(stored, dtype, width):
    spec = HRA(rank=8)
    u = hra.start(spec, width, torch.Generator().manual_seed(0))["u"].to(stored)
    (factor,) = hra.factors(hra.cores({"u": u}, spec), spec)
    x = torch.randn(64, width).to(dtype)
    assert torch.equal(factor(x), x)


def test_the_start_learns():
    """The gradient at equal pairs is not zero, and does not leave them equal."""
    spec = HRA(rank=4, dtype=torch.float64)
    u = hra.start(spec, 8, torch.Generator().manual_seed(0))["u"].requires_grad_()
    weights = torch.randn(8, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad((compact(u) * weights).sum(), u)
    assert (grad[::2] - grad[1::2]).norm() > 0.1 * grad.norm() > 0
    (expected,) = torch.autograd.grad((sequential(u) * weights).sum(), u)
    torch.testing.assert_close(grad, expected)


def test_gradcheck():
    u = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compact, u)
    assert torch.autograd.gradcheck(lambda u: hra.penalty({"u": u}, HRA(rank=4, weight=0.3)), u)


@given(d=st.integers(8, 24), rank=ranks, std=st.floats(0.001, 0.5), seed=st.integers(0, 2**16))
def test_health_reports_the_largest_angle(d, rank, std, seed):
    spec = HRA(rank=rank, init_std=std)
    tensors = hra.start(spec, d, torch.Generator().manual_seed(seed))
    norm, error = hra.health(tensors, spec)
    assert error == 0
    turned = torch.linalg.eigvals(compact(tensors["u"])).angle().abs().max()
    assert 2 * torch.arctan(norm).item() == pytest.approx(turned.item(), rel=0.02)


def test_penalty_is_zero_where_the_directions_are_orthonormal():
    u = torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64)).Q.mT
    spec = HRA(rank=4, weight=2.0)
    assert hra.penalty({"u": 3 * u}, spec).item() < 1e-28
    start = hra.start(spec, 8, torch.Generator())  # equal pairs: at least 1 for each of the four
    assert hra.penalty(start, spec).item() >= 2.0 * 4 - 1e-9
    assert hra.penalty(start, dataclasses.replace(spec, weight=0.0)).item() == 0


def test_more_reflections_than_coordinates_are_refused():
    assert "at most 6" in hra.misfit(HRA(rank=8), 7)
    assert hra.misfit(HRA(rank=8), 8) is None
