"""A graph over 4-bit weights folds as its module does: to an ordinary float graph, or back."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.export import export

import oftfx
from oftfx import OFT, MergeError, OftfxWarning, testing
from oftfx.sites.gemm_4bit import Operands
from tests.quantised import as_linear, linear4bit
from tests.small import rows

SPEC = OFT(block_size=8, init_std=0.1)
X = rows(torch.float32, 64)
ONE_OP = hasattr(torch.ops.bitsandbytes, "gemm_4bit")  # since bitsandbytes 0.50
READ = "gemm_4bit" if ONE_OP else "dequantize_4bit"
"""What reads a packed weight."""


def base() -> nn.Module:
    torch.manual_seed(0)
    linears = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
    return nn.Sequential(linear4bit(linears[0]), nn.Tanh(), linear4bit(linears[1], "fp4", False))


@pytest.fixture(scope="module")
def model():
    return oftfx.adapt(base(), SPEC, example_inputs=X)


@pytest.fixture(scope="module")
def program(model):
    with torch.no_grad():
        return export(model, (X,), strict=True)


def forms(program) -> dict:
    opened = oftfx.differentiable(program)
    return {"closed": program, "opened": opened, "unlifted": opened.module()}


every_form = pytest.mark.parametrize("form", ["closed", "opened", "unlifted"])


def ops(graph) -> str:
    return " ".join(str(node.target) for node in graph.graph.nodes)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_to_floats_it_computes_what_the_merged_module_does(form, dtype, model, program):
    merged, report = oftfx.merge(forms(program)[form], report=True, dtype=dtype)
    module, expected = oftfx.merge(copy.deepcopy(model), report=True, dtype=dtype)
    held = dict(merged.named_parameters())
    for name in ("0.weight", "2.weight"):
        assert torch.equal(held[name], module.get_parameter(name))
    (got,), (wanted,) = testing.run(merged, X), testing.run(module.float(), X)
    testing.assert_close(got, wanted, "output", testing.tolerance(dtype))  # a module rounds biases
    assert [site.fqn for site in report.sites] == [site.fqn for site in expected.sites]
    for site, other in zip(report.sites, expected.sites, strict=True):
        assert site.rounding_error == pytest.approx(other.rounding_error, rel=1e-3, abs=1e-8)


@every_form
def test_by_default_to_bfloat16_with_nothing_quantised_left(form, program):
    given = forms(program)[form]
    merged = oftfx.merge(given)
    assert "bitsandbytes" not in ops(merged)
    assert "oftfx" not in ops(merged)
    held = dict(merged.named_parameters())
    assert held.keys() == {"0.weight", "0.bias", "2.weight"}
    assert held["0.weight"].dtype is torch.bfloat16
    if form == "unlifted":
        read = {node.target for node in merged.graph.find_nodes(op="get_attr")}
        assert read == held.keys()
        assert not [name for name in vars(merged) if "quant_state" in name]
    else:
        assert not merged.constants
    within = testing.tolerance(torch.bfloat16)
    testing.assert_close(testing.run(merged, X)[0], testing.run(program, X)[0], "output", within)


def test_the_program_given_is_untouched(program):
    before, expected = ops(program), program.module()(X)
    oftfx.merge(program)
    oftfx.merge(program, requantize=True)
    assert ops(program) == before
    assert torch.equal(program.module()(X), expected)


@every_form
def test_requantised_it_stores_what_the_module_does(form, model, program):
    merged, report = oftfx.merge(forms(program)[form], report=True, requantize=True)
    module, expected = oftfx.merge(copy.deepcopy(model), report=True, requantize=True)
    assert ops(merged).count(READ) == 2
    assert torch.equal(testing.run(merged, X)[0], testing.run(module, X)[0])
    for site, other in zip(report.sites, expected.sites, strict=True):
        assert site.survived == pytest.approx(other.survived, rel=1e-4)


@every_form
def test_a_small_rotation_is_rounded_away_loudly(form):
    model = oftfx.adapt(base(), OFT(block_size=8, init_std=1e-3), example_inputs=X)
    given = forms(export(model, (X,), strict=True))[form]
    with pytest.warns(OftfxWarning, match=r"rounded most of the adaptation away at 2 of 2"):
        oftfx.merge(given, requantize=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("training", [False, True], ids=["inference form", "training form"])
def test_a_graph_that_dynamo_captured(training):
    with torch.set_grad_enabled(training):
        graph, _ = torch._dynamo.export(base())(X.clone().requires_grad_(training))
    oftfx.adapt(graph, SPEC)
    expected = graph(X)
    kept = oftfx.merge(copy.deepcopy(graph), requantize=True)
    merged = oftfx.merge(graph, dtype=torch.float32)
    assert merged is graph
    testing.assert_close(merged(X), expected, "output")
    anew = base()
    first, second = (p.detach() for p in merged.parameters() if p.dim() == 2)
    anew[0].weight = linear4bit(as_linear(first)).weight
    anew[2].weight = linear4bit(as_linear(second), "fp4", False).weight
    testing.assert_close(kept(X), anew(X), "output")


def test_saved_loaded_and_adapted_anew(program, tmp_path):
    torch.export.save(oftfx.merge(program, dtype=torch.float32), tmp_path / "merged.pt2")
    loaded = torch.export.load(tmp_path / "merged.pt2")
    assert [site.kind for site in oftfx.plan(loaded, SPEC).sites] == ["linear", "linear"]
    expected = loaded.module()(X)
    again = oftfx.adapt(loaded, OFT(block_size=8))
    assert torch.equal(again.module()(X), expected)


def test_layers_that_were_not_adapted_become_floats_too():
    program = oftfx.adapt(export(base(), (X,), strict=True), OFT(block_size=8, targets="0"))
    merged, report = oftfx.merge(program, report=True)
    assert "bitsandbytes" not in ops(merged)
    assert [site.fqn for site in report.sites] == ["0"]
    kept = oftfx.merge(program, requantize=True)
    assert ops(kept).count(READ) == 2


def test_where_only_float_layers_were_adapted_the_rest_stays_quantised():
    torch.manual_seed(0)
    model = nn.Sequential(linear4bit(nn.Linear(64, 64)), nn.Linear(64, 64))
    program = oftfx.adapt(
        export(model, (X,), strict=True), OFT(block_size=8, init_std=0.1, targets="1")
    )
    merged = oftfx.merge(program)
    assert ops(merged).count(READ) == 1
    testing.assert_close(merged.module()(X), program.module()(X), "output")


def test_a_weight_read_twice_is_folded_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = linear4bit(nn.Linear(64, 64))

        def forward(self, x):
            return self.fc(self.fc(x).tanh())

    torch.manual_seed(0)
    program = oftfx.adapt(export(Twice(), (X,), strict=True), SPEC)
    expected = program.module()(X)
    merged = oftfx.merge(program, dtype=torch.float32)
    assert ops(merged).count("aten.linear") == 2
    assert dict(merged.named_parameters()).keys() == {"fc.weight", "fc.bias"}
    testing.assert_close(merged.module()(X), expected, "output")
    _, report = oftfx.merge(program, report=True, requantize=True)
    assert [site.fqn for site in report.sites] == ["fc"]


def test_one_layers_floats_at_a_time(monkeypatch, program):
    """Each layer's float32 weight is gone before the next one's is made."""
    alive: list[weakref.ref] = []
    real = Operands.weight

    def watched(self, dtype=torch.float32):
        assert not [ref for ref in alive if ref() is not None]
        weight = real(self, dtype)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(Operands, "weight", watched)
    oftfx.merge(program, report=True)
    assert len(alive) >= 4


def test_a_damaged_quant_state_is_found_before_anything_changes(model):
    graph = forms(export(copy.deepcopy(model), (X,), strict=True))["unlifted"]
    before = ops(graph)
    *_, last = (node for node in graph.graph.nodes if READ in str(node.target))
    getattr(graph, last.args[3 if ONE_OP else 1].target).fill_(float("nan"))
    with pytest.raises(MergeError, match="2: its quantised weight is not finite"):
        oftfx.merge(graph)
    assert ops(graph) == before


def test_options_that_do_not_fit_are_refused(program):
    for options in ({"dtype": torch.int8}, {"dtype": torch.float32, "requantize": True}):
        with pytest.raises(MergeError):
            oftfx.merge(program, **options)
    floats = oftfx.adapt(export(nn.Sequential(nn.Linear(64, 64)), (X,)), SPEC)
    with pytest.raises(MergeError, match="quantised layers, and the model has none"):
        oftfx.merge(floats, requantize=True)
