"""PSOFT is W_res + BCA, as a map of the input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oftfx
from oftfx import LOFT, OFT, PSOFT, PlanError, SpecError
from oftfx.ops.factor import Factor
from oftfx.rotations import cayley, fixed, loft, num_trainable, oft, psoft, supports
from tests.small import llama, rows, small, tokens

DOUBLE = {"dtype": torch.float64}
EYE = torch.eye


def tensors(spec, weight: torch.Tensor, std: float = 0.1) -> dict[str, torch.Tensor]:
    """A site's parameters, turned away from the identity."""
    width = weight.shape[1]
    values = {
        name: std * torch.randn(shape, dtype=torch.float64)
        for name, shape in psoft.shapes(spec, width).items()
    }
    return values | fixed(spec, width, 0, lambda: weight)


def factor_of(values, spec, method=psoft) -> Factor:
    (factor,) = method.factors(method.cores(values, spec), spec)
    return factor


def folded(values, spec, weight, method=psoft) -> torch.Tensor:
    return factor_of(values, spec, method).transposed()(weight)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def gram(weight: torch.Tensor) -> torch.Tensor:
    return weight @ weight.mT


@given(
    out=st.integers(2, 9),
    width=st.integers(2, 9),
    data=st.data(),
    relaxed=st.booleans(),
    svd=st.sampled_from(["randomized", "full"]),
)
def test_the_map_is_the_papers_surgery_on_the_weight(out, width, data, relaxed, svd):
    """``W_res + B C A = W (I + Aᵀ(C − I)A)`` with B = W Aᵀ and C = diag(b)·R·diag(a)."""
    rank = data.draw(st.integers(2, width))
    torch.manual_seed(out * width)
    spec = PSOFT(rank=rank, relaxed=relaxed, svd=svd, **DOUBLE)
    weight, x = normal(out, width), normal(4, width)
    values = tensors(spec, weight)
    a = values["support"]
    b = weight @ a.mT
    # In the papers' order, with each matrix made here and not by the code under test.
    q = cayley.skew(values["theta"], rank)
    series = sum(torch.matrix_power(q, i) for i in range(spec.order + 1))
    turn = (EYE(rank).double() + q) @ series
    c = turn.mT
    if relaxed:
        c = torch.diag(1 + values["beta"]) @ c @ torch.diag(1 + values["alpha"])
    surgery = (weight - b @ a) + b @ c @ a
    short = weight @ (EYE(width).double() + a.mT @ (c - EYE(rank).double()) @ a)
    torch.testing.assert_close(short, surgery, rtol=0, atol=1e-12)
    torch.testing.assert_close(folded(values, spec, weight), surgery, rtol=0, atol=1e-12)
    mapped = factor_of(values, spec)(x) @ weight.mT
    torch.testing.assert_close(mapped, x @ surgery.mT, rtol=0, atol=1e-11)


def test_alpha_scales_what_the_subspace_reads_and_beta_what_it_writes():
    spec = PSOFT(rank=2, **DOUBLE)
    values = {
        "theta": torch.zeros(1, dtype=torch.float64),
        "alpha": torch.tensor([1.0, 0.0], dtype=torch.float64),
        "beta": torch.tensor([0.0, 2.0], dtype=torch.float64),
        "support": EYE(4, dtype=torch.float64)[:2],
    }
    values["theta"] += 0.5
    core = psoft.rotation(values["theta"], spec) + EYE(2).double()
    mapped = factor_of(values, spec)(EYE(4, dtype=torch.float64))
    torch.testing.assert_close(mapped[0, :2], 2 * core[0] * torch.tensor([1.0, 3.0]).double())
    torch.testing.assert_close(mapped[1, :2], core[1] * torch.tensor([1.0, 3.0]).double())
    torch.testing.assert_close(mapped[2:], EYE(4, dtype=torch.float64)[2:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relaxed", [True, False])
@pytest.mark.parametrize("guard", [None, "rescale", "exact"])
def test_the_start_is_the_identity_bit_for_bit(dtype, relaxed, guard):
    spec = PSOFT(rank=5, relaxed=relaxed, guard=guard, dtype=dtype)
    x, weight = torch.randn(3, 12).to(dtype), normal(7, 12)
    start = psoft.start(spec, 12, torch.Generator())
    values = {name: value.to(dtype) for name, value in start.items()}
    assert values.keys() | {"support"} == psoft.shapes(spec, 12).keys()
    factor = factor_of(values | fixed(spec, 12, 0, lambda: weight), spec)
    assert torch.equal(factor(x), x)


@given(out=st.integers(1, 8), data=st.data())
def test_strict_keeps_every_angle_and_norm_and_relaxed_does_not(out, data):
    torch.manual_seed(out)
    weight = normal(out + 1, 8)
    rank = data.draw(st.integers(2, 8))
    strict = PSOFT(rank=rank, relaxed=False, exact=True, **DOUBLE)
    values = tensors(strict, weight, 0.5)
    turned = folded(values, strict, weight)
    torch.testing.assert_close(gram(turned), gram(weight), rtol=0, atol=1e-12)
    assert not torch.allclose(turned, weight, atol=1e-3)
    relaxed = PSOFT(rank=rank, exact=True, **DOUBLE)
    scaled = folded(tensors(relaxed, weight, 0.5), relaxed, weight)
    assert not torch.allclose(gram(scaled), gram(weight), atol=1e-3)


def test_constant_vectors_keep_the_angles_within_the_principal_part():
    """Theorem 4.1's second half: both vectors constant scale W_pri and turn it, no more."""
    weight = normal(6, 9)
    spec = PSOFT(rank=9, exact=True, **DOUBLE)
    values = tensors(spec, weight, 0.3)
    values["alpha"], values["beta"] = torch.full((2, 9), 0.25, dtype=torch.float64).unbind()
    scaled = gram(folded(values, spec, weight))
    torch.testing.assert_close(scaled, gram(weight) * 1.25**4)
    values["alpha"][0] += 0.5
    bent = gram(folded(values, spec, weight))
    sizes = torch.diagonal(bent).sqrt()
    own = torch.diagonal(gram(weight)).sqrt()
    assert not torch.allclose(
        bent / (sizes[:, None] * sizes), gram(weight) / (own[:, None] * own), atol=1e-3
    )


def test_of_full_rank_it_is_full_oft_in_the_basis_of_the_singular_vectors():
    weight, x = normal(12, 8), normal(5, 8)
    spec = PSOFT(rank=8, relaxed=False, svd="full", **DOUBLE)
    values = tensors(spec, weight)
    full = OFT(block_size=8, **DOUBLE)
    (rotate,) = oft.factors(oft.cores({"theta": values["theta"][None]}, full), full)
    v = torch.linalg.svd(weight)[2].mT
    # The same vectors, up to their signs, which are the decomposition's to choose.
    torch.testing.assert_close((values["support"] @ v).abs(), EYE(8).double(), rtol=0, atol=1e-9)
    v = values["support"].mT
    torch.testing.assert_close(factor_of(values, spec)(x), rotate(x @ v) @ v.mT, rtol=0, atol=1e-12)


def test_the_symmetric_split_of_the_singular_values_would_break_it():
    """With A = √Σ·Vᵀ and B = U·√Σ, a rotation between them bends angles: why A is orthonormal."""
    weight = normal(6, 9)
    u, sizes, vh = torch.linalg.svd(weight, full_matrices=False)
    spec = PSOFT(rank=4, relaxed=False, exact=True, **DOUBLE)
    turn = psoft.rotation(0.3 * normal(6), spec) + EYE(4).double()
    root = sizes[:4].sqrt()
    principal = (u[:, :4] * sizes[:4]) @ vh[:4]
    split = (u[:, :4] * root) @ turn.mT @ (root[:, None] * vh[:4])
    ours = (u[:, :4] * sizes[:4]) @ turn.mT @ vh[:4]
    torch.testing.assert_close(gram(ours), gram(principal), rtol=0, atol=1e-12)
    assert not torch.allclose(gram(split), gram(principal), atol=1e-2)


def test_strict_is_lofts_principal_support():
    weight = normal(10, 16)
    strict = PSOFT(rank=4, relaxed=False, **DOUBLE)
    principal = LOFT(rank=4, support="principal", **DOUBLE)
    values = tensors(strict, weight)
    theirs = {"theta": values["theta"], **fixed(principal, 16, 0, lambda: weight)}
    assert torch.equal(folded(values, strict, weight), folded(theirs, principal, weight, loft))
    # Relaxed, with vectors of 1, it is the same again.
    relaxed = PSOFT(rank=4, **DOUBLE)
    ones = {name: torch.zeros(4, dtype=torch.float64) for name in ("alpha", "beta")}
    assert torch.equal(folded(values | ones, relaxed, weight), folded(values, strict, weight))


@pytest.mark.parametrize("relaxed", [True, False])
@pytest.mark.parametrize("fields", [{}, {"exact": True}, {"guard": "rescale"}, {"order": 3}])
def test_gradients_are_right(relaxed, fields):
    spec = PSOFT(rank=4, relaxed=relaxed, **fields, **DOUBLE)
    weight, x = normal(5, 7), normal(3, 7).requires_grad_()
    values = tensors(spec, weight, 0.2)
    support = values.pop("support")
    leaves = [value.requires_grad_() for value in values.values()]

    def run(x, *given):
        named = dict(zip(values, given, strict=True))
        return factor_of({**named, "support": support}, spec)(x)

    assert torch.autograd.gradcheck(run, (x, *leaves))


@pytest.mark.parametrize("relaxed", [True, False])
@pytest.mark.parametrize("norm", [0.05, 0.5, 0.85])
def test_reported_health_is_that_of_the_map(relaxed, norm):
    spec = PSOFT(rank=6, relaxed=relaxed, **DOUBLE)
    values = tensors(spec, normal(9, 10), norm / 10)
    theta = values["theta"]
    values["theta"] = theta * norm / torch.linalg.matrix_norm(cayley.skew(theta, 6), ord=2)
    reported, error = psoft.health(values, spec)
    assert norm * (1 - 1e-12) <= float(reported) <= 1.01 * norm
    measured = float(factor_of(values, spec).defect())
    assert float(error) >= measured * (1 - 1e-9) - 1e-14
    slack = 1.01 if relaxed else 1.01 ** (2 * spec.order + 2)
    assert float(error) <= measured * slack + 1e-14
    batched = psoft.health({name: torch.stack([v, v]) for name, v in values.items()}, spec)
    torch.testing.assert_close(batched[0], reported.expand(2))
    torch.testing.assert_close(batched[1], error.expand(2))


# The golden counts of trainable numbers.


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (PSOFT(rank=46), 46 * 45 // 2 + 2 * 46),
        (PSOFT(rank=46, relaxed=False), 1035),
        (PSOFT(rank=424), 90_524),
    ],
)
def test_counts_depend_on_the_rank_alone(spec, count):
    assert num_trainable(spec, 768) == num_trainable(spec, 4096) == count


def test_the_papers_count_for_deberta_is_reproduced():
    """72 linears, r = 46: 0.08M trainable numbers."""
    assert round(72 * num_trainable(PSOFT(rank=46), 768) / 1e6, 2) == 0.08


# Models.


def test_the_directions_come_from_each_layers_own_weight_and_are_never_trained():
    model = oftfx.adapt(llama(), PSOFT(rank=8))
    before = {}
    for name, module in model.named_modules():
        if "oft" in module._modules:
            support = module.oft.default.support
            best = float(torch.linalg.svdvals(module.weight.detach())[:8].norm())
            assert 0.99 * best <= float((module.weight @ support.mT).norm()) <= 1.0001 * best
            assert not support.requires_grad
            before[name] = support.clone()
    trained = oftfx.parameters(model)
    assert len(before) == 14
    assert sum(p.numel() for p in trained) == 14 * (28 + 16)
    assert all(parameter.requires_grad for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(**tokens(), labels=tokens()["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    for name, support in before.items():
        assert torch.equal(model.get_submodule(name).oft.default.support, support)


def test_the_directions_are_at_least_float32_whatever_is_trained():
    model = small("mlp", torch.bfloat16)
    oftfx.adapt(model, PSOFT(rank=3, dtype=torch.bfloat16), example_inputs=rows(torch.bfloat16))
    held = model[0].oft.default
    assert (held.theta.dtype, held.support.dtype) == (torch.bfloat16, torch.float32)


def test_sites_that_share_a_rotation_have_the_vectors_of_their_stacked_weights():
    model, x = small("attention"), rows()
    stacked = torch.cat([model.q.weight, model.k.weight, model.v.weight]).detach()
    spec = PSOFT(rank=3, share_inputs=True, **DOUBLE)
    oftfx.adapt(model, spec, example_inputs=x)
    support = model.q.oft.default.support
    sizes = torch.linalg.svdvals(stacked)[:3]
    torch.testing.assert_close((stacked @ support.mT).norm(dim=0), sizes, rtol=1e-6, atol=0)


def test_a_checkpoint_is_loaded_without_decomposing_anything(tmp_path, monkeypatch):
    x = rows()
    model = oftfx.adapt(small("attention"), PSOFT(rank=3, init_std=0.2), example_inputs=x)
    oftfx.save(model, tmp_path)

    def never(*args):
        raise AssertionError("a weight was decomposed")

    monkeypatch.setattr(supports, "principal", never)
    loaded = oftfx.load(small("attention"), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded.q.oft.default.support, model.q.oft.default.support)


def test_a_conv1ds_directions_are_those_of_its_transposed_weight():
    linear, conv = small("mlp"), small("conv1d")
    with torch.no_grad():
        conv.up.weight.copy_(linear[0].weight.mT)
    spec = PSOFT(rank=3, svd="full", **DOUBLE)
    oftfx.adapt(linear, spec, example_inputs=rows())
    oftfx.adapt(conv, spec, example_inputs=rows())
    ours, theirs = conv.up.oft.default.support, linear[0].oft.default.support
    torch.testing.assert_close((ours @ theirs.mT).abs(), EYE(3).double(), rtol=0, atol=1e-9)


# Bad input.


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rank": 1}, "rank=1: must be ≥ 2"),
        ({"rank": 2.0}, "integer"),
        ({"relaxed": 1}, "bool"),
        ({"svd": "lanczos"}, "'randomized', 'full'"),
        ({"guard": "clip"}, "'rescale' or 'exact'"),
        ({"order": 0}, "≥ 1"),
    ],
)
def test_an_invalid_field_names_the_range(fields, told):
    with pytest.raises(SpecError, match=told):
        PSOFT(**fields)


def test_a_rank_above_the_width_is_refused_by_the_plan():
    with pytest.raises(PlanError, match="rank=9 exceeds its input width 8"):
        oftfx.plan(small("mlp"), PSOFT(rank=9), rows())


@pytest.mark.parametrize("kind", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(kind):
    model = small("mlp")
    with torch.no_grad():
        model[2].weight[0, 0] = kind
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(PlanError, match="2: its weight is not finite"):
        oftfx.adapt(model, PSOFT(rank=2), example_inputs=rows())
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_on_meta_is_planned_and_adapted_once_it_is_loaded():
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8))
    plan = oftfx.plan(empty, PSOFT(rank=2), torch.empty(1, 8))
    with pytest.raises(PlanError, match="on `meta`"):
        oftfx.adapt(empty, plan)
    model = oftfx.adapt(nn.Sequential(nn.Linear(8, 8)), plan)
    assert model[0].oft.default.support.norm() > 1
