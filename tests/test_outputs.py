"""Magnitudes: each layer scales its own outputs, and nothing but its product."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.export import export

import oftfx
from oftfx import OFT, MergeError, PlanError, testing
from oftfx.modules import SharedRotation
from tests.quantised import assert_unchanged, linear4bit, linear8bit, quantised_llama, stored
from tests.small import rows, small, tokens

SPEC = OFT(block_size=4, magnitude=True, dtype=torch.float64)
SHARED = OFT(block_size=4, magnitude=True, share_inputs=True, dtype=torch.float64)
FORMS = ("module", "graph", "program")

x = rows()


def base(name: str, form: str):
    model = small(name)
    if form == "program":
        return export(model, (x,))
    return fx.symbolic_trace(model) if form == "graph" else model


def adapted(name: str, form: str, spec: OFT = SPEC):
    model = oftfx.adapt(base(name, form), spec, example_inputs=x if form == "module" else None)
    return testing.randomize(model, std=0.2)


@pytest.mark.parametrize("bias", [True, False])
def test_the_weight_is_scaled_by_rows_and_the_bias_is_not(bias):
    layer = nn.Linear(8, 6, bias=bias).double()
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    testing.randomize(oftfx.adapt(model, SPEC, example_inputs=x), std=0.3)
    m = layer.oft.default.magnitude.detach()
    rotation = layer.oft.default
    expected = (1 + m)[:, None] * rotation.turned(weight).detach()
    added = layer.bias.detach().clone() if bias else torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ expected.mT + added)
    oftfx.merge(model)
    torch.testing.assert_close(layer.weight, nn.Parameter(expected), check_stride=False)
    if bias:
        assert torch.equal(layer.bias, added)


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_share_a_rotation_scale_their_own_outputs(form, tmp_path):
    model = adapted("attention", form, SHARED)
    names = list(testing.thetas(model))
    assert sum(name.endswith("theta") for name in names) == 2
    assert sum(name.endswith("magnitude") for name in names) == 4
    if form != "module":
        testing.assert_same_function(model, adapted("attention", "module", SHARED), x)
    testing.assert_folds(model, x)
    oftfx.save(model, tmp_path)
    for other in FORMS:
        loaded = oftfx.load(base("attention", other), tmp_path)
        testing.assert_same_function(loaded, model, x)
    testing.assert_same_function(oftfx.remove(model), small("attention"), x, within=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_adapter_leaves_the_shared_layers_magnitudes_trainable(form):
    model = adapted("attention", form, SHARED)
    before = set(testing.thetas(model))
    model = oftfx.adapt(model, OFT(block_size=2), "second", x if form == "module" else None)
    called = testing.callable_of(model)
    trained = {name for name, value in testing.thetas(called).items() if value.requires_grad}
    assert before < trained


def test_the_plan_counts_each_layers_outputs():
    plan = oftfx.plan(small("attention"), SHARED, x)
    assert [site.num_trainable for site in plan.sites] == [2 * 6 + 8, 8, 8, 2 * 6 + 8]
    model = oftfx.adapt(small("attention"), plan)
    assert sum(p.numel() for p in oftfx.parameters(model)) == plan.num_trainable
    assert isinstance(model.k.oft.default, SharedRotation)


def test_a_layer_can_go_without():
    spec = OFT(block_size=4, magnitude=True, overrides={"2": {"magnitude": False}})
    model = oftfx.adapt(small("mlp"), spec, example_inputs=x)
    assert {name.rpartition(".")[2] for name in testing.thetas(model) if name[0] == "2"} == {
        "theta"
    }
    assert not oftfx.adapt(small("mlp"), OFT(block_size=4), example_inputs=x)[0].oft.default.outputs


@pytest.mark.parametrize("form", FORMS[:2])
def test_disabled_leaves_the_outputs_alone(form):
    model = adapted("mlp", form)
    with oftfx.disabled(model):
        testing.assert_same_function(model, small("mlp"), x, within=0, grad=False)
    assert not torch.allclose(model(x), small("mlp")(x))


@pytest.mark.parametrize("form", FORMS)
def test_health_is_that_of_the_rotations(form):
    model = adapted("mlp", form)
    plain = oftfx.adapt(base("mlp", form), OFT(block_size=4), example_inputs=x)
    values = testing.thetas(model)
    with torch.no_grad():
        for name, value in testing.thetas(plain).items():
            value.copy_(values[name])
    assert oftfx.health(model).fqns == oftfx.health(plain).fqns
    torch.testing.assert_close(oftfx.health(model).norm, oftfx.health(plain).norm)


class Adds(nn.Module):
    """A matmul that adds a whole tensor, which the gradient has to reach."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
        self.beta = beta

    def forward(self, x):
        return torch.addmm(torch.tanh(x), x, self.weight, beta=self.beta)


def test_what_a_matmul_adds_is_not_scaled_whatever_it_is():
    flat = x.flatten(0, 1)
    model = Adds(1.0)
    graph = oftfx.adapt(fx.symbolic_trace(copy.deepcopy(model)), SPEC)
    module = oftfx.adapt(model, SPEC, example_inputs=flat)
    for each in (graph, module):
        testing.randomize(each, std=0.2)
    testing.assert_same_function(graph, module, flat)
    testing.assert_folds(graph, flat)


def test_a_multiple_of_what_a_matmul_adds_is_refused():
    graph = fx.symbolic_trace(Adds(0.5))
    nodes = list(graph.graph.nodes)
    with pytest.raises(PlanError, match=r"weight: its matmul adds a multiple .* beta=0\.5"):
        oftfx.adapt(graph, SPEC)
    assert list(graph.graph.nodes) == nodes


def test_an_output_that_something_reads_unscaled_is_not_merged():
    graph = adapted("mlp", "graph")
    (product,) = graph.graph.find_nodes(op="call_module", target="0")
    (output,) = graph.graph.output_node().args
    with graph.graph.inserting_before(graph.graph.output_node()):
        both = graph.graph.call_function(torch.sum, (product,))
        graph.graph.output_node().args = (graph.graph.call_function(torch.add, (output, both)),)
    graph.recompile()
    with pytest.raises(MergeError, match="0: sum_1 reads its output unscaled, too"):
        oftfx.merge(graph)


@pytest.mark.parametrize("make", [linear4bit, linear8bit], ids=["4 bit", "8 bit"])
def test_on_quantised_layers(make):
    model = quantised_llama(make)
    before, kept = testing.run(model, tokens())[0], stored(model)
    oftfx.adapt(model, OFT(block_size=8, magnitude=True, share_inputs=True))
    assert torch.equal(testing.run(model, tokens())[0], before)
    testing.randomize(model, std=0.1)
    optimizer = torch.optim.Adam(oftfx.parameters(model), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(**tokens(), labels=tokens()["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_unchanged(model, kept)
    if make is linear4bit:  # an int8 layer rounds its activations, which its floats do not
        expected = testing.run(model, tokens())[0].detach()
        merged = oftfx.merge(model, dtype=torch.float32)
        testing.assert_close(testing.run(merged, tokens())[0].detach(), expected, "merged", 1e-4)
