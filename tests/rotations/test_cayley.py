"""SO(b) from a skew matrix: what the series and the exact transform promise, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.oft.layer import OFTRotationModule

from oftfx.rotations import cayley

EPS = torch.finfo(torch.float64).eps


def random_theta(b: int, n: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, b * (b - 1) // 2, generator=generator, dtype=torch.float64)


def random_skew(b: int, norm: float, n: int = 2, seed: int = 0) -> torch.Tensor:
    """Skew matrices (n, b, b) of exactly this spectral norm."""
    q = cayley.skew(random_theta(b, n, seed), b)
    return q * (norm / torch.linalg.matrix_norm(q, ord=2))[:, None, None]


def naive_series(q: torch.Tensor, order: int) -> torch.Tensor:
    """The core by the definition, ``(I+Q)(I+Q+…+Q^k) − I``, power by power."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    total = sum(torch.linalg.matrix_power(q, i) for i in range(order + 1))
    return (eye + q) @ total - eye


def size_of_series(norm: float, order: int, b: int) -> float:
    """What rounding may cost: b·eps for every power of Q that is added up."""
    return 4 * b * EPS * sum(2 * norm**i for i in range(order + 2))


blocks = st.integers(2, 12)
orders = st.integers(1, 8)
norms = st.floats(0.01, 2.0)
seeds = st.integers(0, 2**16)


# --- packing ---


def test_parameters_are_the_strict_upper_triangle_row_by_row():
    q = cayley.skew(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]), 4)
    expected = torch.tensor(
        [
            [0.0, 1.0, 2.0, 3.0],
            [-1.0, 0.0, 4.0, 5.0],
            [-2.0, -4.0, 0.0, 6.0],
            [-3.0, -5.0, -6.0, 0.0],
        ]
    )
    assert torch.equal(q, expected[None])


@pytest.mark.parametrize("b", [2, 3, 5, 8, 31, 64])
def test_packing_follows_triu_indices(b):
    theta = random_theta(b)
    q = cayley.skew(theta, b)
    rows, columns = torch.triu_indices(b, b, 1)
    assert torch.equal(q[:, rows, columns], theta)
    assert torch.equal(q, -q.mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packing_keeps_the_dtype(dtype):
    assert cayley.skew(random_theta(4).to(dtype), 4).dtype == dtype


@pytest.mark.parametrize("b", [2, 3, 7])
def test_skew_grad_is_the_gradient_of_skew(b):
    theta = random_theta(b).requires_grad_()
    grad = torch.randn(2, b, b, dtype=torch.float64)
    (expected,) = torch.autograd.grad(cayley.skew(theta, b), theta, grad)
    torch.testing.assert_close(cayley.skew_grad(grad), expected, rtol=0, atol=4 * EPS)
    assert torch.autograd.gradcheck(lambda t: cayley.skew(t, b), theta)


# --- the series ---


@pytest.mark.parametrize("order", range(1, 9))
def test_series_is_two_q_up_to_the_last_power(order):
    """``I + 2Q + … + 2Q^k + Q^{k+1}``, read off a scalar: Q = iθ has powers we can write down."""
    q = random_skew(2, 0.5)
    theta = q[:, 0, 1]
    z = 1j * theta
    expected = sum(2 * z**i for i in range(1, order + 1)) + z ** (order + 1)
    core = cayley.neumann(q, order)
    torch.testing.assert_close(core[:, 0, 0], expected.real, rtol=0, atol=16 * EPS)
    torch.testing.assert_close(core[:, 0, 1], expected.imag, rtol=0, atol=16 * EPS)


@given(b=blocks, order=orders, norm=norms, seed=seeds)
def test_series_equals_the_naive_sum(b, order, norm, seed):
    q = random_skew(b, norm, seed=seed)
    atol = size_of_series(norm, order, b)
    torch.testing.assert_close(cayley.neumann(q, order), naive_series(q, order), rtol=0, atol=atol)


@given(b=blocks, order=orders, norm=norms, seed=seeds)
def test_error_law_is_an_equality(b, order, norm, seed):
    """``R − R_k = Q^{k+1} R``, inside the disc and outside it."""
    q = random_skew(b, norm, seed=seed)
    exact = cayley.exact(q)
    error = exact - cayley.neumann(q, order)
    eye = torch.eye(b, dtype=q.dtype)
    expected = torch.linalg.matrix_power(q, order + 1) @ (eye + exact)
    torch.testing.assert_close(error, expected, rtol=0, atol=size_of_series(norm, order, b))


@given(b=blocks, order=orders, norm=st.floats(0.1, 2.0), seed=seeds)
def test_error_has_the_size_of_the_next_power(b, order, norm, seed):
    """R is orthogonal, so ``‖R − R_k‖₂ = ‖Q‖₂^{k+1}``."""
    q = random_skew(b, norm, seed=seed)
    size = torch.linalg.matrix_norm(cayley.exact(q) - cayley.neumann(q, order), ord=2)
    expected = torch.full_like(size, norm ** (order + 1))
    torch.testing.assert_close(size, expected, rtol=1e-10, atol=size_of_series(norm, order, b))


@given(b=blocks, order=orders, norm=st.floats(0.01, 0.999), seed=seeds)
def test_orthogonality_error_is_an_equality_inside_the_disc(b, order, norm, seed):
    q = random_skew(b, norm, seed=seed)
    r = torch.eye(b, dtype=q.dtype) + cayley.neumann(q, order)
    real = torch.linalg.matrix_norm(r.mT @ r - torch.eye(b, dtype=q.dtype), ord=2)
    law = cayley.orthogonality_error(torch.full_like(real, norm), order)
    torch.testing.assert_close(law, real, rtol=1e-10, atol=8 * size_of_series(norm, order, b))


@given(b=blocks, order=orders, norm=st.floats(1.0, 3.0), seed=seeds)
def test_orthogonality_error_never_flatters_outside_the_disc(b, order, norm, seed):
    """There a smaller eigenvalue may be the worst one; ‖Q‖ alone then gives a bound."""
    q = random_skew(b, norm, seed=seed)
    r = torch.eye(b, dtype=q.dtype) + cayley.neumann(q, order)
    real = torch.linalg.matrix_norm(r.mT @ r - torch.eye(b, dtype=q.dtype), ord=2)
    law = cayley.orthogonality_error(torch.full_like(real, norm), order)
    assert (law >= real * (1 - 1e-9)).all()


def test_orthogonality_error_counts_an_eigenvalue_worse_than_the_largest():
    """With k=3 and θ⁴ = 2 the largest angle happens to be kept; one with θ = 1 is destroyed."""
    q = torch.zeros(4, 4, dtype=torch.float64)
    q[0, 1], q[2, 3] = 2**0.25, 1.0
    q = q - q.mT
    r = torch.eye(4, dtype=q.dtype) + cayley.neumann(q[None], 3)[0]
    real = torch.linalg.matrix_norm(r.mT @ r - torch.eye(4, dtype=q.dtype), ord=2)
    assert float(real) == pytest.approx(1.0)
    law = cayley.orthogonality_error(torch.tensor(2**0.25, dtype=torch.float64), 3)
    assert float(law) >= float(real) * (1 - 1e-9)


# Rows and columns of the table in methods.md §2, to the digits printed there.
GOLDEN = {
    0.1: {2: 1e-6, 3: 2e-4, 4: 1e-10, 5: 2e-6, 6: 1e-14},
    0.3: {2: 7.3e-4, 3: 1.6e-2, 4: 5.9e-6, 5: 1.5e-3, 6: 4.8e-8},
    0.6: {2: 4.7e-2, 3: 0.24, 4: 6.0e-3, 5: 9.6e-2, 6: 7.8e-4},
}


@pytest.mark.parametrize("norm", GOLDEN)
@pytest.mark.parametrize("order", range(2, 7))
def test_golden_table_of_orthogonality_errors(norm, order):
    law = float(cayley.orthogonality_error(torch.tensor(norm, dtype=torch.float64), order))
    assert law == pytest.approx(GOLDEN[norm][order], rel=0.03)  # two printed digits
    r = torch.eye(8, dtype=torch.float64) + cayley.neumann(random_skew(8, norm, n=1), order)
    real = float(torch.linalg.matrix_norm(r.mT @ r - torch.eye(8, dtype=torch.float64), ord=2))
    assert real == pytest.approx(law, rel=1e-9, abs=64 * EPS)


def test_exact_transform_has_no_orthogonality_error():
    assert not cayley.orthogonality_error(torch.tensor([0.0, 0.5, 7.0]), None).any()


@pytest.mark.parametrize("order", [*range(1, 9), None])
def test_zero_is_exactly_the_identity(order):
    q = torch.zeros(3, 5, 5)
    core = cayley.exact(q) if order is None else cayley.neumann(q, order)
    assert torch.equal(core, torch.zeros(3, 5, 5))


# --- the exact transform ---


@given(b=blocks, norm=st.floats(0.01, 50.0), seed=seeds)
def test_exact_transform_is_a_rotation(b, norm, seed):
    r = torch.eye(b, dtype=torch.float64) + cayley.exact(random_skew(b, norm, seed=seed))
    defect = torch.linalg.matrix_norm(r.mT @ r - torch.eye(b, dtype=r.dtype), ord=2)
    # I − Q has condition at most √(1+‖Q‖²).
    bound = 8 * b * EPS * (1 + norm)
    assert (defect <= bound).all()
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(2).double(), rtol=0, atol=b * bound)


@pytest.mark.parametrize("theta", [-3.0, -0.2, 0.1, 1.0, 4.0])
def test_exact_transform_turns_by_twice_the_arctangent(theta):
    q = torch.tensor([[[0.0, theta], [-theta, 0.0]]], dtype=torch.float64)
    angle = 2 * math.atan(theta)
    cosine, sine = math.cos(angle), math.sin(angle)
    r = torch.eye(2, dtype=torch.float64) + cayley.exact(q)[0]
    expected = torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64)
    torch.testing.assert_close(r, expected, rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("b", [4, 7])
def test_every_eigenvalue_turns_by_twice_the_arctangent(b):
    q = random_skew(b, 2.0, n=1)[0]
    r = torch.eye(b, dtype=torch.float64) + cayley.exact(q[None])[0]
    turned = torch.linalg.eigvals(r).angle().sort().values
    expected = (2 * torch.arctan(torch.linalg.eigvals(q).imag)).sort().values
    torch.testing.assert_close(turned, expected, rtol=0, atol=64 * b * EPS)


# --- the norm ---


@given(b=st.integers(2, 64), exponent=st.floats(-3, 2), seed=seeds)
def test_spectral_norm_is_the_svds_from_above_within_a_hundredth(b, exponent, seed):
    q = cayley.skew(random_theta(b, seed=seed), b) * 10**exponent
    ratio = cayley.spectral_norm(q) / torch.linalg.matrix_norm(q, ord=2)
    assert (ratio >= 1 - 1e-12).all()
    assert (ratio <= 1.01).all()


@pytest.mark.parametrize("b", [2, 3, 32, 64])
def test_spectral_norm_is_within_a_hundredth_when_all_angles_are_equal(b):
    """The worst case for a trace: every eigenvalue pair counts as much as the largest."""
    q = torch.zeros(1, b, b, dtype=torch.float64)
    for i in range(0, b - 1, 2):
        q[0, i, i + 1], q[0, i + 1, i] = 0.3, -0.3
    assert 0.3 * (1 - 1e-12) <= float(cayley.spectral_norm(q)) <= 0.3 * 1.01


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-5, 1.0, 1e5, 1e20, 1e30])
def test_spectral_norm_neither_overflows_nor_vanishes_in_float32(scale):
    q = random_skew(8, 1.0).float() * scale
    ratio = cayley.spectral_norm(q) / scale
    assert (ratio >= 1 - 1e-5).all()
    assert (ratio <= 1.01).all()


def test_spectral_norm_of_zero_is_zero():
    q = torch.stack([torch.zeros(4, 4), random_skew(4, 0.5)[0].float()])
    assert cayley.spectral_norm(q)[0] == 0
    assert cayley.spectral_norm(q)[1] > 0.49


def test_spectral_norm_of_nan_is_nan():
    q = random_skew(4, 0.5)
    q[0, 0, 1] = math.nan
    assert cayley.spectral_norm(q).isnan().tolist() == [True, False]


@pytest.mark.parametrize("b", [2, 3, 6])
def test_spectral_norm_has_the_right_gradient(b):
    theta = random_theta(b).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: cayley.spectral_norm(cayley.skew(t, b)), theta)


# --- hand-written gradients ---


@pytest.mark.parametrize("order", range(1, 9))
@pytest.mark.parametrize("b", [2, 5])
def test_neumann_grad_is_the_gradient_of_the_series_as_the_parameters_see_it(order, b):
    q = random_skew(b, 0.8).requires_grad_()
    grad = torch.randn(2, b, b, dtype=torch.float64)
    (expected,) = torch.autograd.grad(naive_series(q, order), q, grad)
    value = cayley.neumann_grad(q.detach(), order, grad)
    torch.testing.assert_close(
        cayley.skew_grad(value), cayley.skew_grad(expected), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("b", [2, 5])
@pytest.mark.parametrize("norm", [0.3, 4.0])
def test_exact_grad_is_the_gradient_of_the_exact_transform(b, norm):
    q = random_skew(b, norm).requires_grad_()
    grad = torch.randn(2, b, b, dtype=torch.float64)
    core = cayley.exact(q)
    (expected,) = torch.autograd.grad(core, q, grad)
    torch.testing.assert_close(
        cayley.exact_grad(core.detach(), grad), expected, rtol=1e-11, atol=1e-11
    )


# --- other people's polynomials ---


def peft_rotation(theta: torch.Tensor, b: int, terms: int | None) -> torch.Tensor:
    """What PEFT makes of the same numbers; None for its exact transform."""
    module = OFTRotationModule(theta.shape[0], theta.shape[1], b, theta.shape[0] * b).double()
    return module._cayley_batch(theta, b, terms is not None, terms or 0)


@pytest.mark.parametrize(("terms", "order"), [(3, 2), (4, 2), (5, 3), (6, 4), (8, 6)])
def test_pefts_terms_are_our_order_plus_two(terms, order):
    theta = 0.1 * random_theta(8)
    ours = torch.eye(8, dtype=torch.float64) + cayley.neumann(cayley.skew(theta, 8), order)
    torch.testing.assert_close(ours, peft_rotation(theta, 8, terms), rtol=0, atol=64 * EPS)


def test_pefts_default_is_order_three():
    theta = 0.1 * random_theta(8)
    module = OFTRotationModule(2, 28, 8, 16).double()
    with torch.no_grad():
        module.weight.copy_(theta)
    x = torch.randn(3, 16, dtype=torch.float64)
    core = cayley.neumann(cayley.skew(theta, 8), 3)
    ours = x @ (torch.eye(16, dtype=torch.float64) + torch.block_diag(*core))
    torch.testing.assert_close(module(x), ours, rtol=0, atol=256 * EPS)


def test_pefts_exact_transform_is_our_transpose():
    theta = random_theta(8)
    # PEFT builds its identity in the default dtype, whatever the parameters' dtype.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        theirs = peft_rotation(theta, 8, None)
    finally:
        torch.set_default_dtype(default)
    ours = torch.eye(8, dtype=torch.float64) + cayley.exact(cayley.skew(theta, 8))
    torch.testing.assert_close(theirs.mT, ours, rtol=0, atol=1e-13)
