"""Every method on a 4-bit base: the float base's own numbers, and not one byte of it changed."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.export import export

import oftfx
from oftfx import LOFT, testing
from tests.quantised import (
    assert_unchanged,
    dequantised,
    linear4bit,
    quantised,
    quantised_llama,
    stored,
)
from tests.small import tokens
from tests.test_methods import SPECS, variants_slow

BATCH = {**tokens(), "labels": tokens()["input_ids"]}
CALIBRATED = {
    "LOFT, skew": LOFT(rank=4),
    "LOFT, gradient and free": LOFT(rank=3, support="gradient", core="free"),
}
every_method = pytest.mark.parametrize("name", [*variants_slow(SPECS), *CALIBRATED])
READING = ("PSOFT", "LOFT, skew")  # the weight, and the gradient
REST = [name for name in (*SPECS, *CALIBRATED) if name not in READING]


@pytest.fixture(scope="module")
def base():
    return quantised_llama(linear4bit)


def adapted(model, name: str):
    if name in CALIBRATED:
        return oftfx.adapt(model, CALIBRATED[name], calibration=[BATCH])
    return oftfx.adapt(model, SPECS[name])


@every_method
def test_starts_as_the_base_and_trains_as_on_its_floats(base, name):
    model = adapted(copy.deepcopy(base), name)
    before = stored(model)
    assert torch.equal(model(**tokens()).logits, base(**tokens()).logits)
    testing.randomize(model, std=0.05)
    twin = adapted(dequantised(base), name)
    for ours, theirs in zip(everything(model), everything(twin), strict=True):
        theirs.data.copy_(ours.data)  # but no directions: those of a method are the floats' own
    testing.assert_same_function(model, twin, tokens())
    assert_unchanged(model, before)


@every_method
def test_folds_to_a_float_model(base, name):
    model = testing.randomize(adapted(copy.deepcopy(base), name), std=0.05)
    expected = model(**tokens()).logits.detach()
    merged = oftfx.merge(model, dtype=torch.float32)
    testing.assert_close(merged(**tokens()).logits.detach(), expected, "output")


def everything(model) -> list[torch.nn.Parameter]:
    return [p for _, p in sorted(testing.thetas(model).items())]


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def pair() -> nn.Module:
    torch.manual_seed(0)
    linears = nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64, bias=False)
    return quantised(nn.Sequential(*linears), linear4bit).eval()


@functools.cache  # adapting it leaves it as it is
def program() -> torch.export.ExportedProgram:
    with torch.no_grad():  # closed to gradients
        return export(pair(), (X,), strict=True)


def pair_adapted(model, name: str):
    x = X if type(model) is nn.Sequential else None
    given = {"calibration": [X], "loss": lambda out, batch: out.square().sum()}
    spec = CALIBRATED.get(name) or SPECS[name]
    model = oftfx.adapt(model, spec, example_inputs=x, **(given if name in CALIBRATED else {}))
    return testing.randomize(model, std=0.05)


@pytest.mark.parametrize(
    "name", [*READING, *(pytest.param(n, marks=pytest.mark.slow) for n in REST)]
)
@pytest.mark.skipif(
    not hasattr(torch.ops.bitsandbytes, "gemm_4bit"), reason="bitsandbytes before 0.50"
)
@pytest.mark.usefixtures("fresh_compiler")
def test_graphs_compute_the_same(name, tmp_path):
    """Exported before it is adapted or after, closed to gradients; loaded from what was saved."""
    model = pair_adapted(pair(), name)
    oftfx.save(model, tmp_path)
    others = [
        pair_adapted(program(), name),
        pair_adapted(program().module(), name),
        oftfx.load(program(), tmp_path),
        oftfx.load(pair(), tmp_path),
        oftfx.differentiable(export(model, (X,), strict=True)),
    ]
    for other in others:
        testing.assert_same_function(other, model, X)


@every_method
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_without_a_graph_break_is_eager(name):
    model = pair_adapted(pair(), name)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    testing.assert_same_function(compiled, model, X)
