"""What must hold for every spec and every model, on random ones."""

import copy
import dataclasses
import tempfile
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.export import Dim, ExportedProgram, export

import oftfx
from oftfx import testing
from tests.properties.programs import Model, build, cases, graph_of, rows

FEW = settings(max_examples=max(1, settings.default.max_examples * 2 // 5))
FORMS = ("module", "graph", "traced", "program")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def as_form(model: Model, form: str, dtype: torch.dtype = torch.float64):
    if form == "graph":
        return graph_of(model)
    if form == "traced":
        return fx.symbolic_trace(model)
    if form == "program":
        batch = {"x": {0: Dim("batch", min=2)}}
        return export(model, (rows(model.program, dtype=dtype),), dynamic_shapes=batch)
    return model


def adapted(program, spec, form: str = "module", dtype: torch.dtype = torch.float64):
    model = as_form(build(program, dtype), form, dtype)
    x = rows(program, dtype=dtype) if form == "module" else None
    return oftfx.adapt(model, spec, example_inputs=x)


@given(cases(starts=(0.0,), dtypes=DTYPES), st.sampled_from(FORMS), st.sampled_from(DTYPES))
def test_adapting_does_not_change_one_bit(case, form, dtype):
    program, spec = case
    x = rows(program, 5, dtype)
    model = adapted(program, spec, form, dtype)
    testing.assert_same_function(model, build(program, dtype), x, within=0, grad=False)


@given(cases(), st.sampled_from(FORMS), st.integers(0, 255))
def test_removing_gives_the_base_back_bit_for_bit(case, form, frozen):
    program, spec = case
    base = build(program)
    for i, parameter in enumerate(base.parameters()):
        parameter.requires_grad_(not frozen >> i % 8 & 1)
    before = copy.deepcopy(base)
    base = as_form(base, form)
    classes = classes_of(base)
    given_x = rows(program) if form == "module" else None
    model = oftfx.adapt(base, spec, example_inputs=given_x)
    model = oftfx.adapt(model, spec, "second", example_inputs=given_x)
    for name in order_of(frozen):
        model = oftfx.remove(model, name)
    testing.assert_same_function(model, before, rows(program, 4), within=0)
    assert classes_of(model) == classes
    if isinstance(model, ExportedProgram):
        held = dict(model.state_dict)
    else:
        held = dict(model.named_parameters(remove_duplicate=False))
    expected = dict(before.named_parameters(remove_duplicate=False))
    assert held.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(held[name], value)
        assert held[name].requires_grad == value.requires_grad, name


def classes_of(model) -> dict[str, type]:
    if isinstance(model, ExportedProgram):
        return {}
    return {name: type(module) for name, module in model.named_modules()}


def order_of(bits: int) -> tuple[str | None, ...]:
    return [("default", "second"), ("second", "default"), (None,)][bits % 3]


@FEW
@given(cases(dtypes=(torch.float64, torch.float32)), st.integers(0, 9))
def test_every_form_computes_the_same_in_value_and_gradient(case, seed):
    program, spec = case
    module = testing.randomize(adapted(program, spec), seed, spec.init_std)
    within = digits_of(spec)
    for form in FORMS[1:]:
        other = testing.randomize(adapted(program, spec, form), seed, spec.init_std)
        for batch in (3, 5):
            testing.assert_same_function(other, module, rows(program, batch), within)
    exported = as_form(module, "program")
    for batch in (3, 5):
        testing.assert_same_function(exported, module, rows(program, batch), within)


def digits_of(spec) -> float | None:
    """What two forms of a model agree to: they make the cores one by one, or all at once.

    Of parameters that are no float64 a core has float32's digits, whatever the model's.
    """
    return None if spec.dtype is torch.float64 else testing.tolerance(torch.float32)


@FEW
@given(cases(), st.sampled_from(("eager", "aot_eager")))
def test_compiled_is_eager(case, backend):
    program, spec = case
    torch._dynamo.reset()
    model = adapted(program, spec)
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    testing.assert_same_function(compiled, model, rows(program))


@given(cases(dtypes=DTYPES), st.sampled_from(FORMS), st.sampled_from(DTYPES))
def test_folded_is_unfolded(case, form, dtype):
    program, spec = case
    testing.assert_folds(adapted(program, spec, form, dtype), rows(program, 5, dtype))


@FEW
@given(cases(), st.sampled_from(("traced", "program")))
def test_folded_is_unfolded_for_a_trace_of_an_adapted_module(case, form):
    program, spec = case
    if form == "traced" and any(layer.tied_to is not None for layer in program.layers):
        form = "program"  # a flat trace may read two tied weights by one name
    model = adapted(program, spec)
    traced = as_form(model, "program")
    traced = traced if form == "program" else traced.module()
    testing.assert_folds(traced, rows(program, 3))


@given(cases(), st.sampled_from(FORMS))
def test_two_adapters_fold_in_reverse(case, form):
    program, spec = case
    model = adapted(program, spec, form)
    second = dataclasses.replace(spec, seed=9, overrides={})
    given_x = rows(program) if form == "module" else None
    model = oftfx.adapt(model, second, "second", example_inputs=given_x)
    testing.assert_folds(model, rows(program))


@FEW
@given(cases(dtypes=DTYPES), st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_saved_is_loaded_into_any_form(case, form, into):
    program, spec = case
    model = testing.randomize(adapted(program, spec, form), 3, spec.init_std)
    with tempfile.TemporaryDirectory() as directory:
        oftfx.save(model, directory)
        loaded = oftfx.load(as_form(build(program), into), directory)
    a, b = testing.thetas(model), testing.thetas(loaded)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    testing.assert_same_function(loaded, model, rows(program), digits_of(spec), grad=False)
    within = digits_of(spec)
    if spec.dtype.itemsize == 2:  # a gradient is rounded to its parameter's dtype, up or down
        within = torch.finfo(spec.dtype).eps
    testing.assert_same_function(loaded, model, rows(program), within)


@given(cases())
def test_rotating_the_input_is_rotating_the_weight(case):
    """x·M·Wᵀ = x·(W·Mᵀ)ᵀ, in value and in the gradient of every rotation, M written out densely."""
    program, spec = case
    model = adapted(program, spec)
    base = build(program)
    thetas = testing.thetas(model)
    kept = dict(model.named_parameters())
    weights = {}
    plan = oftfx.plan(base, spec, rows(program))
    for site in plan.sites:
        holder = next(other for other in plan.sites if other.fqn == site.rotation)
        bare = not holder.weight.endswith(".weight")
        path = oftfx.modules.parameter_path(holder.weight, "default", bare)
        at = plan.spec_of(site)
        method = oftfx.rotations.method_of(at)
        held = {name: kept[f"{path}.{name}"] for name in method.shapes(at, site.in_features)}
        dense = torch.eye(site.in_features, dtype=torch.float64)
        for factor in method.factors(method.cores(held, at), at):
            dense = factor(dense)
        weight = base.get_parameter(site.weight).detach()
        turned = weight @ dense.mT if site.layout == "out_in" else dense @ weight
        own = oftfx.modules.parameter_path(
            site.weight, "default", not site.weight.endswith(".weight")
        )
        if getattr(at, "magnitude", False):
            scales = 1 + thetas[f"{own}.magnitude"]
            turned = scales[:, None] * turned if site.layout == "out_in" else turned * scales
        weights[site.weight] = turned
    outs = torch.func.functional_call(base, weights, (rows(program),), tie_weights=False)
    for a, b in zip(outs, model(rows(program)), strict=True):
        testing.assert_close(a.detach(), b.detach(), "output")
    total = sum(torch.sin(7 * out).sum() for out in outs)
    found = torch.autograd.grad(total, list(thetas.values()))
    expected = torch.autograd.grad(
        sum(torch.sin(7 * out).sum() for out in model(rows(program))), list(thetas.values())
    )
    for name, a, b in zip(thetas, found, expected, strict=True):
        testing.assert_close(a, b, f"gradient of {name}", within=1e-10)


@FEW
@given(cases())
def test_gradcheck(case):
    program, spec = case
    model = adapted(program, spec)
    names = list(testing.thetas(model))

    def run(x, *thetas):
        # A copy: gradcheck writes to x in ways that leave no trace in its version, and what readers
        # of one tensor keep for each other goes by that.
        given = dict(zip(names, thetas, strict=True))
        return torch.func.functional_call(model, given, (x.clone(),))

    thetas = [value.detach().clone().requires_grad_() for value in testing.thetas(model).values()]
    x = rows(program, 2).requires_grad_()
    torch.autograd.gradcheck(run, (x, *thetas), fast_mode=True, atol=1e-6)


@given(cases(), st.sampled_from(FORMS))
def test_the_same_start_in_every_form_and_whatever_else_is_adapted(case, form):
    program, spec = case
    model = testing.thetas(adapted(program, spec))
    other = testing.thetas(adapted(program, spec, form))
    assert model.keys() == other.keys()
    assert all(torch.equal(model[name], other[name]) for name in model)
    if spec.share_inputs or spec.overrides:
        return
    plan = oftfx.plan(build(program), spec, rows(program))
    site = plan.sites[-1]
    alone = dataclasses.replace(spec, targets=site.fqn)
    path = oftfx.modules.parameter_path(site.weight, "default", not site.weight.endswith(".weight"))
    for name, value in testing.thetas(adapted(program, alone, form)).items():
        assert name.startswith(f"{path}.")
        assert torch.equal(value, model[name])
