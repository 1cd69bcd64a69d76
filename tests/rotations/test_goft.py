"""GOFT and qGOFT: exactly orthogonal, what they reach, and how they are tied to each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oftfx import GOFT, QGOFT
from oftfx.ops.givens import stages
from oftfx.rotations import goft, qgoft

EYE2 = torch.eye(2, dtype=torch.float64)


def dense(method, spec, **tensors: torch.Tensor) -> torch.Tensor:
    (factor,) = method.factors(method.cores(tensors, spec), spec)
    width = factor.operands[0].shape[0] + 1
    return factor(torch.eye(width, dtype=torch.float64))


def angles(d: int) -> torch.Tensor:
    return torch.randn(d - 1, dtype=torch.float64)


@given(d=st.integers(2, 40), seed=st.integers(0, 2**16))
def test_is_a_rotation(d, seed):
    torch.manual_seed(seed)
    matrix = dense(goft, GOFT(), theta=angles(d))
    eye = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(matrix.mT @ matrix, eye, rtol=0, atol=1e-14)
    assert torch.linalg.det(matrix).item() == pytest.approx(1)


@given(d=st.integers(2, 40), seed=st.integers(0, 2**16))
def test_turns_any_vector_into_the_first_axis(d, seed):
    """The tree of arctan2: each pair's angle brings its second coordinate to zero."""
    torch.manual_seed(seed)
    x = torch.randn(d, dtype=torch.float64)
    left, theta = x.clone(), []
    for step, _ in stages(d):
        second = left[step :: 2 * step]
        first = left[:: 2 * step][: len(second)]
        theta.append(torch.atan2(-second, first))
        first.copy_(torch.hypot(first, second))
    reached = x @ dense(goft, GOFT(), theta=torch.cat(theta))
    expected = torch.zeros(d, dtype=torch.float64)
    expected[0] = x.norm() if d > 1 else x[0]
    torch.testing.assert_close(reached, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("angle", [1e-6, 0.1, 3.0])
def test_a_pair_turns_by_its_angle(angle):
    theta = torch.tensor([angle], dtype=torch.float64)
    cos, sin = theta.cos(), theta.sin()
    expected = torch.stack((torch.cat((cos, sin)), torch.cat((-sin, cos))))
    torch.testing.assert_close(dense(goft, GOFT(), theta=theta), expected, rtol=1e-15, atol=1e-15)
    norm, _ = goft.health({"theta": theta}, GOFT())
    assert 2 * torch.arctan(norm).item() == pytest.approx(angle)


def test_small_angles_keep_their_digits():
    """cos θ − 1 in float32 is −θ²/2, where the subtraction would leave zero."""
    (core,) = goft.cores({"theta": torch.tensor([1e-5])}, GOFT())
    assert core[0, 0, 0].item() == pytest.approx(-0.5e-10, rel=1e-5)


@given(d=st.integers(2, 40), seed=st.integers(0, 2**16))
def test_qgoft_on_rotations_is_goft_at_no_penalty(d, seed):
    torch.manual_seed(seed)
    theta = angles(d)
    cos, sin = theta.cos(), theta.sin()
    blocks = torch.stack((cos, sin, -sin, cos), -1).view(-1, 2, 2) - EYE2
    torch.testing.assert_close(
        dense(qgoft, QGOFT(), blocks=blocks), dense(goft, GOFT(), theta=theta)
    )
    assert qgoft.penalty({"blocks": blocks}, QGOFT()).item() < 1e-28


def test_qgofts_penalty_is_of_the_columns():
    blocks = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 0.0], [0.0, -2.0]]]).double() - EYE2
    penalty = qgoft.penalty({"blocks": blocks}, QGOFT(weight=0.5))
    assert penalty.item() == pytest.approx(0.5 * (1 * 2 + 3 * 4) ** 2)
    assert torch.autograd.gradcheck(
        lambda value: qgoft.penalty({"blocks": value}, QGOFT()), blocks.requires_grad_()
    )


@given(d=st.integers(2, 40), seed=st.integers(0, 2**16))
def test_a_scale_multiplies_every_coordinate(d, seed):
    torch.manual_seed(seed)
    theta, scale = angles(d), torch.randn(d, dtype=torch.float64)
    expected = dense(goft, GOFT(), theta=theta) * (1 + scale)
    found = dense(goft, GOFT(scale=True), theta=theta, scale=scale)
    torch.testing.assert_close(found, expected)


@given(d=st.integers(2, 12), scale=st.booleans(), seed=st.integers(0, 2**16))
def test_reported_error_is_that_of_the_worst_block(d, scale, seed):
    torch.manual_seed(seed)
    tensors = {"blocks": 0.3 * torch.randn(d - 1, 2, 2, dtype=torch.float64)}
    if scale:
        tensors["scale"] = 0.3 * torch.randn(d, dtype=torch.float64)
    spec = QGOFT(scale=scale)
    _, error = qgoft.health(tensors, spec)
    (factor,) = qgoft.factors(qgoft.cores(tensors, spec), spec)
    torch.testing.assert_close(error, factor.defect())


def test_one_coordinate_cannot_turn():
    assert "one coordinate" in goft.misfit(GOFT(), 1)
    assert goft.misfit(GOFT(), 2) is None
