"""OFT's parameters, its cores and its guards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oftfx import OFT, SpecError
from oftfx.rotations import cayley, oft


def theta_of_norm(b: int, *norms: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Parameters of blocks whose Q has exactly these spectral norms."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(len(norms), b * (b - 1) // 2, generator=generator, dtype=torch.float64)
    size = torch.linalg.matrix_norm(cayley.skew(theta, b), ord=2)
    return (theta * (torch.tensor(norms, dtype=torch.float64) / size)[:, None]).to(dtype)


def defects(core: torch.Tensor) -> torch.Tensor:
    """``‖RᵀR − I‖₂`` of every block."""
    eye = torch.eye(core.shape[-1], dtype=torch.float64)
    r = core.double() + eye
    return torch.linalg.matrix_norm(r.mT @ r - eye, ord=2)


@pytest.mark.parametrize(("width", "b"), [(64, 32), (12, 4), (6, 2), (9, 3), (7, 7)])
def test_every_block_has_its_strict_upper_triangle(width, b):
    assert oft.shapes(OFT(block_size=b), width) == {"theta": (width // b, b * (b - 1) // 2)}
    assert oft.misfit(OFT(block_size=b), width) is None


@pytest.mark.parametrize(
    ("width", "b", "near"), [(48, 32, "[16, 24, 48]"), (30, 7, "[5, 6, 10]"), (7, 4, "[7]")]
)
def test_a_block_size_that_does_not_divide_names_those_that_do(width, b, near):
    why = oft.misfit(OFT(block_size=b), width)
    assert f"block_size={b} does not divide its input width {width}" in why
    assert near in why


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("guard", [None, "rescale", "exact"])
@pytest.mark.parametrize("exact", [False, True])
def test_zero_parameters_are_the_identity(dtype, guard, exact):
    spec = OFT(block_size=4, guard=guard, exact=exact, dtype=dtype)
    core = oft.core(torch.zeros(3, 6, dtype=dtype), spec)
    assert torch.equal(core, torch.zeros_like(core))
    assert core.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@given(
    b=st.integers(2, 9),
    order=st.integers(1, 8),
    norm=st.floats(0.01, 0.8),
    guard=st.sampled_from([None, "rescale", "exact"]),
)
def test_guards_do_nothing_well_inside_the_disc(b, order, norm, guard):
    theta = theta_of_norm(b, norm, norm / 2)
    plain = oft.core(theta, OFT(block_size=b, order=order))
    assert torch.equal(oft.core(theta, OFT(block_size=b, order=order, guard=guard)), plain)


@given(b=st.integers(2, 9), norm=st.floats(0.95, 30.0))
def test_rescale_keeps_every_block_in_the_disc(b, norm):
    spec = OFT(block_size=b, order=4, guard="rescale")
    theta = theta_of_norm(b, norm, 0.1)
    core = oft.core(theta, spec)
    error = float(cayley.orthogonality_error(torch.tensor(cayley.DISC), 4))
    assert (defects(core) <= error * 1.0001).all()
    # Only the length of Q changes: the block is the series of Q shrunk.
    q = cayley.skew(theta[:1], b)
    shrunk = q * cayley.DISC / cayley.spectral_norm(q)
    torch.testing.assert_close(core[:1], cayley.neumann(shrunk, 4), rtol=1e-12, atol=1e-12)
    assert (oft.norm(theta, spec) <= cayley.DISC).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rescale_keeps_low_precision_parameters_in_the_disc(dtype):
    """The parameter's own rounding may move the norm by an ulp, and nothing else may."""
    spec = OFT(block_size=8, order=4, guard="rescale", dtype=dtype)
    core = oft.core(theta_of_norm(8, 0.95, 1.5, 4.0, 20.0, dtype=dtype), spec)
    ulp = 2 * torch.finfo(dtype).eps
    error = cayley.orthogonality_error(torch.tensor(cayley.DISC * (1 + ulp)), 4)
    assert (defects(core) <= error * 1.0001).all()
    # Shrunk to the disc and no further than the norm's own hundredth.
    least = cayley.orthogonality_error(torch.tensor(cayley.DISC * (0.99 - ulp)), 4)
    assert (defects(core) >= least).all()


@given(b=st.integers(2, 9), norm=st.floats(0.95, 30.0))
def test_exact_guard_stays_orthogonal_outside_the_disc(b, norm):
    spec = OFT(block_size=b, order=4, guard="exact")
    theta = theta_of_norm(b, norm, 0.1)
    core = oft.core(theta, spec)
    assert float(defects(core)[0]) <= 1e-13 * b * (1 + norm)
    torch.testing.assert_close(core[0], cayley.exact(cayley.skew(theta, b))[0])
    torch.testing.assert_close(core[1], cayley.neumann(cayley.skew(theta, b), 4)[1])
    assert oft.orthogonality_error(oft.norm(theta, spec), spec).tolist()[0] == 0


@pytest.mark.parametrize("guard", [None, "rescale", "exact"])
@pytest.mark.parametrize("exact", [False, True])
def test_gradients_are_right_on_both_sides_of_the_guard(guard, exact):
    spec = OFT(block_size=4, guard=guard, exact=exact, dtype=torch.float64)
    theta = theta_of_norm(4, 0.3, 1.7, 0.6).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: oft.core(t, spec), theta)


@pytest.mark.parametrize("guard", ["rescale", "exact"])
def test_gradients_at_zero_are_those_of_the_series(guard):
    """An untrained block must learn: no NaN from the norm of a zero Q in the branch not taken."""
    theta = torch.zeros(2, 6, requires_grad=True)
    weights = torch.randn(2, 4, 4)
    (guarded,) = torch.autograd.grad(
        (oft.core(theta, OFT(block_size=4, guard=guard)) * weights).sum(), theta
    )
    (plain,) = torch.autograd.grad((oft.core(theta, OFT(block_size=4)) * weights).sum(), theta)
    torch.testing.assert_close(guarded, plain)
    assert plain.abs().sum() > 0


def test_reported_norm_and_error_are_those_of_the_core():
    theta = theta_of_norm(8, 0.05, 0.5, 0.85)
    for order in (1, 2, 3, 4):
        spec = OFT(block_size=8, order=order, dtype=torch.float64)
        norm = oft.norm(theta, spec)
        real = torch.tensor([0.05, 0.5, 0.85], dtype=torch.float64)
        assert (norm >= real * (1 - 1e-12)).all()
        assert (norm <= 1.01 * real).all()
        error = oft.orthogonality_error(norm, spec)
        assert (error >= defects(oft.core(theta, spec)) - 1e-14).all()
        assert (error <= cayley.orthogonality_error(1.01 * real, order)).all()


@pytest.mark.parametrize("order", range(1, 7))
def test_doubled_has_the_last_power_twice(order):
    """PEFT 0.17's I + 2Q + … + 2Q^{t−1} for t = k + 2 terms."""
    theta = theta_of_norm(6, 0.4)
    q = cayley.skew(theta, 6)
    expected = 2 * sum(torch.linalg.matrix_power(q, power) for power in range(1, order + 2))
    spec = OFT(block_size=6, order=order, doubled=True)
    torch.testing.assert_close(oft.blocks(theta, spec), expected, rtol=0, atol=1e-14)
    norm, error = oft.health({"theta": theta}, spec)
    torch.testing.assert_close(norm, torch.tensor(0.4, dtype=torch.float64), rtol=0.01, atol=0)
    # ‖Q‖₂ is known to 0.7 %, of which the error is a power.
    exact = cayley.doubled_error(torch.tensor([0.4], dtype=torch.float64), order)
    torch.testing.assert_close(exact, defects(expected), rtol=1e-9, atol=0)
    assert exact <= error * (1 + 1e-9) <= 1.01 ** (order + 4) * exact


def test_doubled_is_the_bare_series():
    for field in ({"exact": True}, {"guard": "rescale"}):
        with pytest.raises(SpecError, match="doubled"):
            OFT(doubled=True, **field)
