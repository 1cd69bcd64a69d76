"""The verbs, on a model of any kind."""

import pytest
import torch
from torch import fx, nn
from torch.export import export

import oftfx
from oftfx import OFT, PlanError, SpecError, testing
from tests.small import rows, small

SPEC = OFT(block_size=4, init_std=0.2)
KINDS = ("module", "graph", "unlifted", "program", "compiled")
x = rows()


def base(kind: str, name: str = "attention"):
    model = small(name)
    if kind == "graph":
        return fx.symbolic_trace(model)
    if kind == "compiled":
        return torch.compile(model, backend="eager")
    if kind == "module":
        return model
    program = export(model, (x,))
    return program if kind == "program" else program.module()


def adapt(kind: str, spec=SPEC, model=None, **options):
    model = base(kind) if model is None else model
    examples = x if kind in ("module", "compiled") else None
    return oftfx.adapt(model, spec, **options, example_inputs=examples)


@pytest.mark.parametrize("kind", KINDS)
def test_adapt_parameters_remove(kind):
    model = adapt(kind)
    testing.assert_same_function(model, adapt("module"), x)
    assert len(oftfx.parameters(model)) == 4
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in oftfx.parameters(model))
    model = oftfx.remove(model)
    testing.assert_same_function(model, small("attention"), x, within=0, grad=False)
    with pytest.raises(PlanError, match="no adapter"):
        oftfx.parameters(model)
    with pytest.raises(PlanError, match="no adapter"):
        oftfx.remove(model)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_by_name(kind):
    model = adapt(kind, name="first")
    model = adapt(kind, OFT(block_size=4, targets="q"), model, name="second")
    assert len(oftfx.parameters(model)) == 5
    assert len(oftfx.parameters(model, "first")) == 4
    assert len(oftfx.parameters(model, "second")) == 1
    with pytest.raises(PlanError, match="third"):
        oftfx.parameters(model, "third")


@pytest.mark.parametrize("kind", ["module", "graph", "unlifted", "compiled"])
def test_disabled_is_the_base_bit_for_bit_and_only_for_a_while(kind):
    expected = testing.run(base(kind), x)[0]
    model = adapt(kind, name="a")
    one = testing.run(model, x)[0]
    model = adapt(kind, OFT(block_size=2, init_std=0.3), model, name="b")
    both = testing.run(model, x)[0]
    with oftfx.disabled(model):
        assert torch.equal(testing.run(model, x)[0], expected)
    with oftfx.disabled(model, "b"):
        assert torch.equal(testing.run(model, x)[0], one)
    with pytest.raises(ZeroDivisionError), oftfx.disabled(model):
        1 / 0  # noqa: B018
    assert torch.equal(testing.run(model, x)[0], both)
    assert len(oftfx.parameters(model)) == 8


def test_a_program_cannot_be_disabled():
    with pytest.raises(PlanError, match="cannot be switched"), oftfx.disabled(adapt("program")):
        pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["", "a.b", "1a", "keys", "training", "_modules"])
def test_a_name_that_is_no_plain_identifier_is_refused(kind, name):
    model = base(kind)
    with pytest.raises(PlanError, match="plain identifier"):
        adapt(kind, model=model, name=name)
    testing.assert_same_function(model, small("attention"), x, within=0, grad=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_or_a_spec_but_nothing_else(kind):
    plan = oftfx.plan(small("attention"), SPEC, x)
    testing.assert_same_function(adapt(kind, plan), adapt("module"), x)
    for spec in (None, "OFT", OFT, {"block_size": 4}):
        with pytest.raises(SpecError, match="must be a spec"):
            adapt(kind, spec)


@pytest.mark.parametrize("model", [None, "a model", torch.zeros(2), lambda x: x])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(PlanError, match=r"must be an nn\.Module"):
        oftfx.adapt(model, SPEC)


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_same_for_every_kind(kind):
    model, other = testing.thetas(adapt(kind)), testing.thetas(adapt("module"))
    assert model.keys() == other.keys()
    assert all(torch.equal(model[name], other[name]) for name in model)


def test_a_model_that_data_parallelism_copies_in_every_step_is_adapted_inside():
    x = rows(torch.float32)
    model = nn.DataParallel(small("attention", torch.float32))
    assert oftfx.adapt(model, OFT(block_size=4, init_std=0.2), example_inputs=x) is model
    assert len(list(oftfx.parameters(model))) == 4
    assert torch.equal(model(x), model.module(x))
    assert not torch.equal(model(x), small("attention", torch.float32)(x))
    oftfx.merge(model)
    assert not hasattr(model.module.q, "oft")
