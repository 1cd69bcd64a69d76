"""A region that a tracer closed to gradients is opened where its op has one, and only there."""

import copy

import pytest
import torch
from torch import nn
from torch.export import export

import oftfx
from oftfx import OFT, PlanError, testing
from tests.quantised import linear4bit, linear8bit
from tests.small import rows

SPEC = OFT(block_size=8, init_std=0.1)
X = rows(torch.float32, 64)
one_op = pytest.mark.skipif(
    not hasattr(torch.ops.bitsandbytes, "gemm_4bit"), reason="bitsandbytes before 0.50"
)


def base() -> nn.Module:
    torch.manual_seed(0)
    linears = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
    return nn.Sequential(linear4bit(linears[0]), nn.Tanh(), linear4bit(linears[1], "fp4", False))


def adapted() -> nn.Module:
    return oftfx.adapt(base(), SPEC, example_inputs=X)


@pytest.mark.parametrize("grad", [False, True], ids=["inference form", "training form"])
def test_an_exported_adapted_model_trains_as_eager_does(grad):
    model = adapted()
    with torch.set_grad_enabled(grad):
        program = export(model, (X,), strict=True)
    opened = oftfx.differentiable(program)
    testing.assert_same_function(opened, model, X)
    testing.assert_same_function(opened.module(), model, X)
    testing.assert_same_function(opened.run_decompositions({}), model, X)


@pytest.mark.parametrize("grad", [False, True], ids=["inference form", "training form"])
def test_an_exported_base_is_planned_and_adapted_as_the_module_is(grad):
    with torch.set_grad_enabled(grad):
        program = export(base(), (X.clone().requires_grad_(grad),), strict=True)
    before = program.graph_module.code
    sites = oftfx.plan(program, SPEC).sites
    assert sites == oftfx.plan(base(), SPEC, X).sites
    assert program.graph_module.code == before
    inserted = oftfx.adapt(program, SPEC)
    testing.assert_same_function(inserted, adapted(), X)
    graph = oftfx.adapt(program.module(), SPEC)
    testing.assert_same_function(graph, adapted(), X)
    removed = oftfx.remove(inserted)
    assert torch.equal(removed.module()(X), base()(X))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("training", [False, True], ids=["inference form", "training form"])
def test_a_graph_that_dynamo_captured_is_planned_and_adapted_as_the_module_is(training):
    with torch.set_grad_enabled(training):
        graph, _ = torch._dynamo.export(base())(X.clone().requires_grad_(training))
    before = graph.code
    assert ("autograd_function_apply" in before) is training
    plan = oftfx.plan(graph, SPEC)
    assert [site.shape for site in plan.sites] == [(64, 64), (32, 64)]
    assert graph.code == before
    oftfx.adapt(graph, SPEC)
    assert "autograd_function_apply" not in graph.code
    model = adapted()
    ours, theirs = testing.thetas(graph), testing.thetas(model)  # Dynamo has names of its own
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        one.data.copy_(other.data)
    assert torch.equal(graph(X), model(X))
    graph(X).square().sum().backward()
    model(X).square().sum().backward()
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        testing.assert_close(one.grad, other.grad, "gradient")


def test_an_adapter_moves_between_the_module_and_its_program(tmp_path):
    program = oftfx.adapt(export(base(), (X,), strict=True), SPEC)
    oftfx.save(program, tmp_path / "program")
    from_program = oftfx.load(base(), tmp_path / "program")
    testing.assert_same_function(from_program, adapted(), X)
    oftfx.save(adapted(), tmp_path / "module")
    from_module = oftfx.load(export(base(), (X,), strict=True), tmp_path / "module")
    testing.assert_same_function(from_module, adapted(), X)


def test_a_saved_program_trains_when_loaded(tmp_path):
    model = adapted()
    torch.export.save(export(model, (X,), strict=True), tmp_path / "model.pt2")
    loaded = oftfx.differentiable(torch.export.load(tmp_path / "model.pt2"))
    testing.assert_same_function(loaded, model, X)


def test_parameters_that_no_gradient_reaches_are_refused():
    program = export(adapted(), (X,), strict=True)
    for closed in (program, program.module()):
        with pytest.raises(PlanError, match="exported closed to gradients"):
            oftfx.parameters(closed)
    assert len(oftfx.parameters(oftfx.differentiable(program))) == 2


@pytest.mark.parametrize(
    "make", [nn.Identity(), linear4bit, linear8bit], ids=["float", "4 bit", "8 bit"]
)
def test_the_users_own_regions_stay_closed(make):
    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = make(nn.Linear(64, 64))

        def forward(self, x):
            with torch.no_grad():
                y = self.fc(x)
            return x + y

    program = export(Closed(), (X,), strict=True)
    assert oftfx.differentiable(program) is program


@one_op
def test_the_op_has_its_gradient():
    from oftfx.sites.bitsandbytes import LINEAR4BIT
    from oftfx.sites.gemm_4bit import register_gradients

    register_gradients()
    layer = base()[0]
    state = layer.weight.quant_state
    x = X.clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    y = torch.ops.bitsandbytes.gemm_4bit.default(
        x,
        layer.weight.data,
        state.shape,
        state.state2.absmax,
        state.blocksize,
        state.quant_type,
        bias=bias,
        absmax_8bit=state.absmax,
        absmax_code=state.state2.code,
        absmax_offset=state.offset,
    )
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), grad)
    torch.testing.assert_close(got[0], grad @ LINEAR4BIT.dequantise(layer))
    torch.testing.assert_close(got[1], grad.sum((0, 1)))
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(got[0], torch.autograd.grad(twin(x), x, grad)[0])
