"""BOFT's butterfly: what it joins, what it equals, and which widths it fits."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oftfx import BOFT, OFT
from oftfx.rotations import boft, oft


def dense(theta: torch.Tensor, spec: BOFT, width: int) -> torch.Tensor:
    matrix = torch.eye(width, dtype=torch.float64)
    for factor in boft.factors(boft.cores({"theta": theta}, spec), spec):
        matrix = factor(matrix)
    return matrix


def random_theta(spec: BOFT, width: int, std: float = 0.1) -> torch.Tensor:
    start = dataclasses.replace(spec, init_std=std)
    return boft.start(start, width, torch.Generator().manual_seed(0))["theta"]


@given(n=st.integers(1, 6), b=st.integers(2, 7), order=st.integers(1, 5), exact=st.booleans())
def test_one_factor_is_oft(n, b, order, exact):
    common = {"block_size": b, "order": order, "exact": exact}
    theta = random_theta(BOFT(factors=1, **common), n * b)
    (factor,) = boft.factors(boft.cores({"theta": theta}, BOFT(**common, factors=1)), BOFT())
    (other,) = oft.factors(oft.cores({"theta": theta[0]}, OFT(**common)), OFT())
    x = torch.randn(3, n * b, dtype=torch.float64)
    assert torch.equal(factor(x), other(x))


@pytest.mark.parametrize(("width", "b"), [(16, 2), (32, 4), (48, 6), (64, 4)])
def test_every_factor_doubles_what_a_coordinate_reads(width, b):
    """b, 2b, 4b, … nonzero entries in every row and column, until the map is dense."""
    m, joined = 1, b
    while boft.misfit(BOFT(block_size=b, factors=m), width) is None:
        spec = BOFT(block_size=b, factors=m, exact=True)
        filled = dense(random_theta(spec, width), spec, width) != 0
        assert (filled.sum(0) == joined).all()
        assert (filled.sum(1) == joined).all()
        m, joined = m + 1, 2 * joined
    runs = 2 * width // b
    if runs & (runs - 1) == 0:  # a power of two: the last that fits is dense
        assert filled.all()
        assert m - 1 == runs.bit_length() - 1


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_last_factor_is_the_first_x_meets(m):
    """``x·F_{m−1} … F_0`` with F_0 on neighbouring coordinates, so that R = F_{m−1} … F_0."""
    spec = BOFT(block_size=4, factors=m)
    factors = boft.factors(boft.cores({"theta": random_theta(spec, 32)}, spec), spec)
    assert [factor.operands[1] for factor in factors] == [2**level for level in reversed(range(m))]


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("share", [False, True])
def test_exact_factors_make_a_rotation(m, share):
    spec = BOFT(block_size=4, factors=m, exact=True, share_blocks=share)
    matrix = dense(random_theta(spec, 32, 0.3), spec, 32)
    eye = torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(matrix.mT @ matrix, eye, rtol=0, atol=1e-13)
    assert torch.linalg.det(matrix).item() == pytest.approx(1)
    norm, error = boft.health({"theta": random_theta(spec, 32, 0.3)}, spec)
    assert norm > 0
    assert error == 0


@pytest.mark.parametrize(
    ("width", "b", "m", "why"),
    [
        (48, 32, 1, "block_size=32 does not divide its input width 48"),
        (96, 32, 2, r"multiples of 2, .* 32 makes 3 .*at most factors=1"),
        (48, 4, 4, r"multiples of 8, .* 4 makes 12 .*at most factors=3"),
    ],
)
def test_factors_that_do_not_fit_say_which_do(width, b, m, why):
    assert re.search(why, boft.misfit(BOFT(block_size=b, factors=m), width))


@pytest.mark.parametrize(("width", "b", "m"), [(64, 32, 2), (48, 4, 3), (8, 2, 3), (30, 5, 1)])
def test_factors_that_fit(width, b, m):
    assert boft.misfit(BOFT(block_size=b, factors=m), width) is None
    assert boft.shapes(BOFT(block_size=b, factors=m), width) == {
        "theta": (m, width // b, b * (b - 1) // 2)
    }
