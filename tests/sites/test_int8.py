"""An int8 layer in a graph is one op: a site with the layer's own gradient, which folds."""

import copy

import pytest
import torch
from torch import nn
from torch.export import export

import oftfx
from oftfx import OFT, PlanError, testing
from oftfx.ops.int8_linear import INT8_LINEAR
from tests.quantised import linear8bit
from tests.small import rows

SPEC = OFT(block_size=8, init_std=0.1)
X = rows(torch.float32, 64)
every_mode = pytest.mark.parametrize("training", [True, False], ids=["rows alone", "x rounded too"])
every_form = pytest.mark.parametrize("grad", [True, False], ids=["closed", "open"])


def base(training: bool, threshold: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = [linear8bit(nn.Linear(64, 64)), linear8bit(nn.Linear(64, 32, bias=False))]
    for layer in layers:
        layer.state.threshold = threshold
    return nn.Sequential(layers[0], nn.Tanh(), layers[1]).train(training)


def adapted(training: bool, threshold: float = 0.0) -> nn.Module:
    return oftfx.adapt(base(training, threshold), SPEC, example_inputs=X)


def traced(model: nn.Module, grad: bool, x: torch.Tensor = X) -> torch.export.ExportedProgram:
    with torch.set_grad_enabled(grad):
        return export(model, (x,), strict=True)


def ops(graph) -> str:
    return " ".join(str(node.target) for node in graph.graph.nodes)


@every_mode
@every_form
@pytest.mark.parametrize(
    "used", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fresh", "after a forward"]
)
def test_an_exported_adapted_model_gives_the_modules_bits_and_gradients(training, grad, used):
    model = adapted(training)
    if used:  # the rows have moved from the parameter to the layer
        model(X)
    program = traced(model, grad)
    if grad or not training:  # else the gradient gets through as it is
        with pytest.raises(PlanError, match="open them first"):
            oftfx.parameters(program)
    opened = oftfx.differentiable(program)
    assert ops(opened).count("int8_linear") == 2
    assert not [key for key in opened.constants if "SCB" not in key]
    for one in (opened, opened.module(), opened.run_decompositions({})):
        testing.assert_same_function(one, model, X)
    assert torch.equal(opened.module()(X), model(X))
    got = torch.autograd.grad(opened.module()(X).sum(), oftfx.parameters(opened))
    expected = torch.autograd.grad(model(X).sum(), oftfx.parameters(model))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@every_mode
def test_an_exported_base_is_planned_and_adapted_as_the_module_is(training):
    program = traced(base(training), grad=True)
    before = program.graph_module.code
    assert oftfx.plan(program, SPEC).sites == oftfx.plan(base(training), SPEC, X).sites
    assert program.graph_module.code == before
    inserted = oftfx.adapt(program, SPEC)
    testing.assert_same_function(inserted, adapted(training), X)
    testing.assert_same_function(oftfx.adapt(program.module(), SPEC), adapted(training), X)
    assert torch.equal(oftfx.remove(inserted).module()(X), base(training)(X))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("training", "grad"),
    [
        (True, True),
        (False, False),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_a_graph_that_dynamo_captured(training, grad):
    with torch.set_grad_enabled(grad):
        graph, _ = torch._dynamo.export(base(training))(X.clone().requires_grad_(grad))
    before = graph.code
    assert [site.shape for site in oftfx.plan(graph, SPEC).sites] == [(64, 64), (32, 64)]
    assert graph.code == before
    oftfx.adapt(graph, SPEC)
    assert "_set_grad_enabled" not in graph.code
    model = adapted(training)
    ours, theirs = testing.thetas(graph), testing.thetas(model)  # Dynamo has names of its own
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        one.data.copy_(other.data)
    assert torch.equal(graph(X), model(X))
    graph(X).square().sum().backward()
    model(X).square().sum().backward()
    assert all(torch.equal(ours[a].grad, theirs[b].grad) for a, b in zip(ours, theirs, strict=True))
    merged = oftfx.merge(graph, dtype=torch.float32)
    assert "int8" not in merged.code
    within = 1e-5 if training else 0.05  # a module in evaluation rounds x, too
    testing.assert_close(merged(X), model(X), "merged", within)


def test_columns_with_outliers_are_not_rounded():
    """As `load_in_8bit=True` of transformers sets it."""
    x = X.clone()
    x[..., 3] = 40.0
    model = adapted(training=False, threshold=6.0)
    opened = oftfx.differentiable(traced(model, grad=False))
    assert "_assert_scalar" not in ops(opened)
    for given in (x, X):
        assert torch.equal(opened.module()(given), model(given))
        got = torch.autograd.grad(opened.module()(given).sum(), oftfx.parameters(opened))
        expected = torch.autograd.grad(model(given).sum(), oftfx.parameters(model))
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    plain = adapted(training=False)
    assert not torch.equal(plain(x), model(x))


@every_mode
def test_folded_as_the_module_is(training):
    model = adapted(training)
    program = traced(model, grad=True)
    merged, report = oftfx.merge(program, report=True, dtype=torch.float32)
    module, expected = oftfx.merge(copy.deepcopy(model), report=True, dtype=torch.float32)
    assert merged.state_dict.keys() == {"0.weight", "0.bias", "2.weight"}
    assert not merged.constants
    for name in ("0.weight", "2.weight"):
        assert torch.equal(merged.state_dict[name], module.get_parameter(name))
    assert [site.fqn for site in report.sites] == [site.fqn for site in expected.sites]
    by_default = oftfx.merge(program)
    assert by_default.state_dict["0.weight"].dtype is torch.bfloat16
    assert "bitsandbytes" not in ops(by_default)
    assert "oftfx" not in ops(by_default)
    kept, told = oftfx.merge(program, report=True, requantize=True)
    again, expected = oftfx.merge(copy.deepcopy(model), report=True, requantize=True)
    assert torch.equal(kept.module()(X), again(X))
    for site, other in zip(told.sites, expected.sites, strict=True):
        assert site.survived == pytest.approx(other.survived, rel=1e-4)


def test_an_opened_program_is_saved_and_trains_when_loaded(tmp_path):
    """PyTorch cannot save one as it was exported."""
    model = adapted(training=True)
    opened = oftfx.differentiable(traced(model, grad=True))
    torch.export.save(opened, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert oftfx.differentiable(loaded) is loaded
    testing.assert_same_function(loaded, model, X)
    merged = oftfx.merge(loaded, dtype=torch.float32)
    testing.assert_close(merged.module()(X), model(X), "merged")


def test_rows_that_are_no_parameters_are_refused_by_name():
    program = traced(base(training=False), grad=False)
    with torch.no_grad():
        program.state_dict["0.weight"].data = torch.zeros_like(program.state_dict["0.weight"])
    for refused in (oftfx.differentiable, lambda p: oftfx.adapt(p, SPEC)):
        with pytest.raises(PlanError, match="weight is not among its parameters"):
            refused(program)


def test_what_pytorch_cannot_export():
    """If it can one day, these forms want to be looked at."""
    with pytest.raises(AttributeError, match="CB"):
        export(adapted(training=False), (X,), strict=False)
    model = adapted(training=False, threshold=6.0)
    model(X)
    with pytest.raises(RuntimeError, match="higher-order op"):
        traced(model, grad=True)


@pytest.mark.parametrize("threshold", [None, 0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_op_has_the_bits_and_the_gradient_of_the_layer(threshold, dtype):
    layer = linear8bit(nn.Linear(64, 32)).train(threshold is None)
    layer.state.threshold = threshold or 0.0
    layer.bias.data = layer.bias.data.to(dtype)
    x = (4 * torch.randn(5, 64)).to(dtype).requires_grad_()
    y = layer(x)
    held = layer.state.CB, [32, 64], layer.state.SCB
    got = INT8_LINEAR(x, *held, layer.bias, threshold)
    assert torch.equal(got, y)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(got, (x, layer.bias), grad)
    expected = torch.autograd.grad(y, (x, layer.bias), grad)
    assert torch.equal(grads[0], expected[0])
    testing.assert_close(grads[1], expected[1], "bias")
    assert torch.library.opcheck(INT8_LINEAR, (x, *held, layer.bias, threshold))
