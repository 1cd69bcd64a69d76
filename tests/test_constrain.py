"""Regularisers and projections, of whole models."""

import dataclasses

import pytest
import torch
from torch import fx
from torch.export import export

import oftfx
from oftfx import BOFT, COFT, GOFT, HRA, OFT, QGOFT, PlanError, testing
from oftfx.rotations import cayley, hra, oft, qgoft
from tests.small import rows, small

FORMS = ("module", "graph", "program")
every_form = pytest.mark.parametrize("form", FORMS)
x = rows(torch.float32)


def adapted(spec, form: str = "module"):
    model = small("attention", torch.float32)
    if form == "graph":
        model = fx.symbolic_trace(model)
    elif form == "program":
        model = export(model, (x,))
    model = oftfx.adapt(model, spec, example_inputs=x if form == "module" else None)
    return testing.randomize(model, 0, 0.3)


@every_form
@pytest.mark.parametrize(
    "spec", [QGOFT(weight=0.3), QGOFT(scale=True), HRA(rank=4, weight=0.1)], ids=str
)
def test_penalty_is_the_sum_over_the_sites_and_reaches_the_parameters(spec, form):
    model = adapted(spec, form)
    method = hra if isinstance(spec, HRA) else qgoft
    held = testing.thetas(model)
    sites = {name.rpartition(".")[0] for name in held}
    assert len(sites) == 4
    expected = sum(
        method.penalty({n: held[f"{site}.{n}"] for n in method.shapes(spec, 8)}, spec)
        for site in sites
    )
    penalty = oftfx.penalty(model)
    assert penalty.shape == ()
    torch.testing.assert_close(penalty, expected)
    assert penalty > 0
    penalty.backward()
    for name, value in held.items():
        assert (value.grad is None) == name.endswith("scale")
        assert value.grad is None or value.grad.abs().sum() > 0


@every_form
@pytest.mark.parametrize("spec", [OFT(block_size=4), BOFT(block_size=2), GOFT(), HRA(rank=4)])
def test_methods_that_are_orthogonal_have_no_penalty(spec, form):
    assert oftfx.penalty(adapted(spec, form)).item() == 0


def test_penalty_of_one_adapter():
    model = adapted(QGOFT())
    first = oftfx.penalty(model)
    oftfx.adapt(model, HRA(rank=2, weight=1.0), "second", x)
    second = oftfx.penalty(model, "second")
    assert second > 0
    torch.testing.assert_close(oftfx.penalty(model), first + second)
    torch.testing.assert_close(oftfx.penalty(model, "default"), first)


@every_form
@pytest.mark.parametrize("function", [oftfx.penalty, oftfx.project])
def test_a_model_without_the_adapter_is_an_error(function, form):
    with pytest.raises(PlanError, match="no adapter"):
        function(small("attention"))
    with pytest.raises(PlanError, match="no adapter 'other'"):
        function(adapted(OFT(block_size=4), form), "other")


@every_form
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_project_keeps_every_block_in_its_ball(form, share, dtype):
    spec = COFT(block_size=4, eps=0.5, share_blocks=share, dtype=dtype)
    model = adapted(spec, form)
    most = spec.eps / (1 if share else 2) ** 0.5
    before = {name: value.detach().clone() for name, value in testing.thetas(model).items()}
    oftfx.project(model)
    moved = 0
    for name, theta in testing.thetas(model).items():
        for old, new in zip(before[name].double(), theta.detach().double(), strict=True):
            size = torch.linalg.matrix_norm(cayley.skew(old, 4)).item()
            eps = torch.finfo(dtype).eps
            if size <= most:
                assert torch.equal(new, old)
            else:
                torch.testing.assert_close(new, old * most / size, rtol=2 * eps, atol=0)
                moved += 1
    assert moved
    once = {name: value.detach().clone() for name, value in testing.thetas(model).items()}
    oftfx.project(model)
    assert all(torch.equal(value, once[name]) for name, value in testing.thetas(model).items())


def test_project_leaves_other_methods_alone():
    model = adapted(OFT(block_size=4))
    before = {name: value.detach().clone() for name, value in testing.thetas(model).items()}
    oftfx.project(model)
    assert all(torch.equal(value, before[name]) for name, value in testing.thetas(model).items())


def test_a_ball_of_no_size_is_the_base():
    model = adapted(COFT(block_size=4, eps=0.0))
    oftfx.project(model)
    testing.assert_same_function(model, small("attention", torch.float32), x, within=0, grad=False)


def test_an_optimizer_can_project_by_itself():
    model = adapted(COFT(block_size=4, eps=0.1))
    optimizer = torch.optim.SGD(oftfx.parameters(model), lr=10.0)
    optimizer.register_step_post_hook(lambda *_: oftfx.project(model))
    model(x).square().sum().backward()
    optimizer.step()
    for theta in oftfx.parameters(model):
        size = torch.linalg.matrix_norm(cayley.skew(theta.detach(), 4))
        assert (size <= 0.1 / 2**0.5 * (1 + 1e-6)).all()


def test_within_the_ball_coft_is_oft():
    theta = 0.01 * torch.randn(2, 6)
    assert torch.equal(
        oft.core(theta, COFT(block_size=4, eps=1.0)), oft.core(theta, OFT(block_size=4))
    )


# multiplicative dropout


def test_dropout_drops_whole_blocks_in_training_only():
    spec = OFT(block_size=2, dropout=0.5, init_std=0.3)
    rotation = oftfx.modules.Rotation(spec, 64, torch.device("cpu"), seed=0, out=8)
    inputs = torch.randn(3, 64)
    rotation.eval()
    whole = rotation(inputs)
    plain = OFT(block_size=2, init_std=0.3)
    without = oftfx.modules.Rotation(plain, 64, torch.device("cpu"), seed=0, out=8)
    assert torch.equal(whole, without(inputs))
    rotation.train()
    seen = set()
    for seed in range(3):
        torch.manual_seed(seed)
        some = rotation(inputs)
        torch.manual_seed(seed)
        assert torch.equal(rotation(inputs), some)
        kept = [torch.equal(some[:, i : i + 2], whole[:, i : i + 2]) for i in range(0, 64, 2)]
        for i, here in zip(range(0, 64, 2), kept, strict=True):
            assert here or torch.equal(some[:, i : i + 2], inputs[:, i : i + 2])
        assert 8 <= sum(kept) <= 24
        seen.add(tuple(kept))
    assert len(seen) == 3


@pytest.mark.parametrize("spec", [BOFT(block_size=2, factors=3), OFT(block_size=2)], ids=str)
@pytest.mark.parametrize("share", [False, True])
def test_dropout_of_every_factor_and_of_shared_blocks(spec, share):
    spec = dataclasses.replace(spec, dropout=0.5, share_blocks=share, init_std=0.3)
    rotation = oftfx.modules.Rotation(spec, 64, torch.device("cpu"), seed=0, out=8)
    inputs = torch.randn(3, 64)
    dropped, whole = rotation.train()(inputs), rotation.eval()(inputs)
    assert not torch.equal(dropped, whole)
    same = (dropped == inputs).all(0)
    assert 0 < same.sum() < 64  # shared parameters, and still each block drawn by itself


def test_dropout_does_not_reach_what_is_folded_or_evaluated():
    model = adapted(OFT(block_size=4, dropout=0.9))
    plain = adapted(OFT(block_size=4))
    testing.assert_same_function(model.eval(), plain.eval(), x)
    merged = oftfx.merge(model.train())
    testing.assert_same_function(merged.eval(), plain, x, grad=False)


@pytest.mark.parametrize("form", ["graph", "program"])
def test_a_graph_says_that_it_drops_nothing(form):
    with pytest.warns(oftfx.OftfxWarning, match="dropout has no effect in a graph"):
        model = adapted(OFT(block_size=4, dropout=0.5), form)
    testing.assert_same_function(model, adapted(OFT(block_size=4)), x)


def test_a_trace_that_drops_blocks_is_not_folded():
    model = adapted(OFT(block_size=4, dropout=0.5)).train()
    with pytest.raises(PlanError, match=r"traced in training mode.*model.eval\(\)"):
        oftfx.merge(export(model, (x,)))
    testing.assert_folds(export(model.eval(), (x,)), x)
