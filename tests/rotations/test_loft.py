"""LOFT: any fixed subspace, a rotation or any map within, and why the skew support is best."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oftfx
from oftfx import LOFT, OFT, PlanError, SpecError
from oftfx.rotations import cayley, fixed, loft, num_trainable, oft, psoft, supports
from tests.rotations.test_psoft import factor_of, folded, gram, normal
from tests.small import rows, small

DOUBLE = {"dtype": torch.float64}
FREE = {"core": "free", "support": "random", **DOUBLE}


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


def theta_of(q: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.triu_indices(len(q), len(q), 1)
    return q[rows, columns]


@given(width=st.integers(2, 10), data=st.data(), core=st.sampled_from(["orthogonal", "free"]))
def test_the_map_is_the_dense_product(width, data, core):
    rank = data.draw(st.integers(2, width))
    torch.manual_seed(width * rank)
    spec = LOFT(rank=rank, support="random", core=core, **DOUBLE)
    support = supports.random(width, rank, torch.Generator())
    q = 0.1 * normal(rank, rank)
    if core == "free":
        values, turn = {"kernel": q}, eye(rank) + q
    else:
        q = q - q.mT
        series = sum(torch.matrix_power(q, i) for i in range(spec.order + 1))
        values, turn = {"theta": theta_of(q)}, (eye(rank) + q) @ series
    dense = eye(width) + support.mT @ (turn - eye(rank)) @ support
    x, values = normal(4, width), values | {"support": support}
    mapped = factor_of(values, spec, loft)(x)
    torch.testing.assert_close(mapped, x @ dense, rtol=0, atol=1e-12)
    weight = normal(3, width)
    torch.testing.assert_close(
        folded(values, spec, weight, loft), weight @ dense.mT, rtol=0, atol=1e-12
    )


def test_with_all_coordinates_for_support_it_is_full_oft():
    spec, full = LOFT(rank=8, support="coordinate", **DOUBLE), OFT(block_size=8, **DOUBLE)
    theta, x = 0.1 * normal(28), normal(5, 8)
    (rotate,) = oft.factors(oft.cores({"theta": theta[None]}, full), full)
    mapped = factor_of({"theta": theta, "support": eye(8)}, spec, loft)(x)
    torch.testing.assert_close(mapped, rotate(x), rtol=0, atol=1e-13)
    # The support as it is made is these coordinates in another order.
    support = fixed(spec, 8, 3, lambda: normal(2, 8))["support"]
    assert torch.equal(support @ support.mT, eye(8))
    mapped = factor_of({"theta": theta, "support": support}, spec, loft)(x)
    torch.testing.assert_close(mapped, rotate(x @ support.mT) @ support, rtol=0, atol=1e-13)


def test_one_direction_and_a_core_of_minus_one_is_a_reflection():
    """Householder's ``I − 2uᵀu``; rank 1 is no spec, but the map is the same."""
    spec = LOFT(rank=2, **FREE)
    u = torch.nn.functional.normalize(normal(1, 9))
    x = normal(4, 9)
    kernel = torch.full((1, 1), -2.0, dtype=torch.float64)
    mapped = factor_of({"kernel": kernel, "support": u}, spec, loft)(x)
    torch.testing.assert_close(mapped, x - 2 * (x @ u.mT) * u, rtol=0, atol=1e-13)


@pytest.mark.parametrize("support", ["principal", "random", "coordinate"])
def test_an_orthogonal_core_keeps_every_angle_and_norm(support):
    spec = LOFT(rank=6, support=support, exact=True, **DOUBLE)
    weight = normal(7, 12)
    values = {"theta": normal(15), **fixed(spec, 12, 0, lambda: weight)}
    turned = folded(values, spec, weight, loft)
    torch.testing.assert_close(gram(turned), gram(weight), rtol=0, atol=1e-12)
    assert not torch.allclose(turned, weight, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("core", ["orthogonal", "free"])
@pytest.mark.parametrize("support", ["principal", "random", "coordinate"])
def test_the_start_is_the_identity_bit_for_bit(dtype, core, support):
    spec = LOFT(rank=4, core=core, support=support, dtype=dtype)
    x, weight = torch.randn(3, 12).to(dtype), normal(7, 12)
    start = loft.start(spec, 12, torch.Generator())
    values = {name: value.to(dtype) for name, value in start.items()}
    assert values.keys() | {"support"} == loft.shapes(spec, 12).keys()
    factor = factor_of(values | fixed(spec, 12, 0, lambda: weight), spec, loft)
    assert torch.equal(factor(x), x)


def test_a_random_start_does_not_repeat_the_random_support():
    """They have one seed, and must not have one stream."""
    spec = LOFT(rank=2, support="random", init_std=1.0)
    start = loft.start(spec, 2, torch.Generator().manual_seed(5))["theta"]
    drawn = torch.randn(4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    assert not torch.isclose(drawn, start).any()


# Why the skew support: to first order, it is what the loss sees of a rotation.


class Problem:
    """A loss of a weight, ``⟨C, tanh(x Wᵀ)⟩``, and its gradient G."""

    def __init__(self, seed: int = 0, out: int = 12, width: int = 16) -> None:
        torch.manual_seed(seed)
        self.weight, self.x, self.c = normal(out, width), normal(9, width), normal(9, out)
        weight = self.weight.clone().requires_grad_()
        (self.gradient,) = torch.autograd.grad(self.loss(weight), weight)

    def loss(self, weight: torch.Tensor) -> torch.Tensor:
        return (self.c * torch.tanh(self.x @ weight.mT)).sum()

    @property
    def skew(self) -> torch.Tensor:
        product = self.weight.mT @ self.gradient
        return 0.5 * (product - product.mT)

    def slope(self, support: torch.Tensor, omega: torch.Tensor) -> float:
        """dL/dt at 0 for T = exp(tΩ), by central differences through the code under test."""
        spec = LOFT(rank=len(omega), support="random", exact=True, **DOUBLE)
        step = 1e-5

        def at(t: float) -> float:
            # Cayley's Q is Ω/2 to first order, and to second.
            values = {"theta": theta_of(t * omega / 2), "support": support}
            return float(self.loss(folded(values, spec, self.weight, loft)))

        return (at(step) - at(-step)) / (2 * step)


@given(seed=st.integers(0, 30), rank=st.sampled_from([2, 4, 7]))
def test_the_loss_changes_by_the_skew_gradient_within_the_support(seed, rank):
    """dL = ⟨PSPᵀ, Ωᵀ⟩ for x ← x·M: the transpose is W's, which folds Mᵀ."""
    problem = Problem(seed)
    support = supports.random(16, rank, torch.Generator().manual_seed(seed))
    omega = normal(rank, rank)
    omega = omega - omega.mT
    predicted = float(((support @ problem.skew @ support.mT) * omega.mT).sum())
    assert problem.slope(support, omega) == pytest.approx(predicted, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_skew_support_sees_most_of_it(seed):
    problem, rank, generator = Problem(seed), 4, torch.Generator()

    def seen(support: torch.Tensor) -> float:
        return float((support @ problem.skew @ support.mT).norm())

    best = float(torch.linalg.svdvals(problem.skew)[:rank].norm())
    skew = supports.principal_exact(problem.skew, rank, generator)
    assert seen(skew) == pytest.approx(best)
    others = [
        supports.principal_exact(problem.gradient, rank, generator),
        supports.principal_exact(problem.weight, rank, generator),
        *(supports.random(16, rank, generator.manual_seed(i)) for i in range(20)),
        supports.coordinate(16, rank, generator),
    ]
    assert all(seen(other) < 0.95 * best for other in others)
    # And the steepest turn within it does what no turn of its size does elsewhere.
    inside = skew @ problem.skew @ skew.mT
    assert problem.slope(skew, inside.mT / inside.norm()) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("core", ["orthogonal", "free"])
def test_gradients_are_right(core):
    spec = LOFT(rank=4, support="random", core=core, **DOUBLE)
    support, x = supports.random(7, 4, torch.Generator()), normal(3, 7).requires_grad_()
    (name, shape), *_ = loft.shapes(spec, 7).items()
    value = (0.2 * normal(*shape)).requires_grad_()

    def run(x, given):
        return factor_of({name: given, "support": support}, spec, loft)(x)

    assert torch.autograd.gradcheck(run, (x, value))


def test_reported_health_is_that_of_the_map():
    support = supports.random(9, 6, torch.Generator())
    theta = 0.2 * normal(15)
    spec = LOFT(rank=6, support="random", order=3, **DOUBLE)
    norm, error = loft.health({"theta": theta, "support": support}, spec)
    exact = float(torch.linalg.matrix_norm(cayley.skew(theta, 6), ord=2))
    assert exact * (1 - 1e-12) <= float(norm) <= 1.01 * exact
    defect = float(factor_of({"theta": theta, "support": support}, spec, loft).defect())
    assert defect * (1 - 1e-12) <= float(error) <= 1.05 * defect
    # A free core that happens to be a rotation has that rotation's health, nearly.
    turn = psoft.rotation(0.01 * theta, spec)
    norm, error = loft.health({"kernel": turn, "support": support}, LOFT(rank=6, **FREE))
    assert float(norm) == pytest.approx(0.01 * exact, rel=0.02)
    assert float(error) < 1e-6
    free = 0.3 * normal(6, 6)
    _, error = loft.health({"kernel": free, "support": support}, LOFT(rank=6, **FREE))
    defect = float(
        factor_of({"kernel": free, "support": support}, LOFT(rank=6, **FREE), loft).defect()
    )
    assert defect * (1 - 1e-12) <= float(error) <= 1.01 * defect


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (LOFT(rank=46), 1035),
        (LOFT(rank=46, core="free"), 2116),
        (LOFT(rank=3, support="random"), 3),
    ],
)
def test_counts_depend_on_the_rank_alone(spec, count):
    assert num_trainable(spec, 768) == num_trainable(spec, 4096) == count


# Bad input.


def test_an_odd_rank_is_half_a_plane_too_many_for_skew():
    with pytest.raises(SpecError, match=r"rank=45: must be even .* planes"):
        LOFT(rank=45)
    assert LOFT(rank=45, support="gradient").rank == 45
    # An override is checked with the spec's own support, not with the default one.
    LOFT(rank=4, support="random", overrides={"q": {"rank": 3}})
    with pytest.raises(SpecError, match="rank=3: must be even"):
        LOFT(rank=4, overrides={"q": {"rank": 3}})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rank": 0}, "≥ 2"),
        ({"support": "top"}, "'skew', 'gradient', 'principal', 'random', 'coordinate'"),
        ({"core": "skew"}, "'orthogonal', 'free'"),
        ({"exact": None}, "bool"),
    ],
)
def test_an_invalid_field_names_the_range(fields, told):
    with pytest.raises(SpecError, match=told):
        LOFT(**fields)


@pytest.mark.parametrize("support", ["skew", "gradient"])
def test_directions_that_follow_the_loss_need_calibration(support):
    model = small("mlp")
    with pytest.raises(
        PlanError, match=rf"0: support='{support}' .*calibration=batches.*'principal'"
    ):
        oftfx.adapt(model, LOFT(rank=2, support=support), example_inputs=rows())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_calibration_that_nothing_needs_is_refused():
    for spec in (OFT(block_size=4), LOFT(rank=2, support="random")):
        with pytest.raises(PlanError, match="no site's directions depend on it"):
            oftfx.adapt(small("mlp"), spec, example_inputs=rows(), calibration=[rows()])


def test_a_loss_without_batches_is_refused():
    with pytest.raises(PlanError, match="no batches to run it on"):
        oftfx.adapt(
            small("mlp"), LOFT(rank=2, support="random"), example_inputs=rows(), loss=torch.sum
        )
