"""Every method on a 4-bit base: the float base's own numbers, and not one byte of it changed."""

import copy

import pytest
import torch

import oftfx
from oftfx import LOFT, testing
from tests.quantised import assert_unchanged, dequantised, linear4bit, quantised_llama, stored
from tests.small import tokens
from tests.test_methods import SPECS, variants_slow

BATCH = {**tokens(), "labels": tokens()["input_ids"]}
CALIBRATED = {
    "LOFT, skew": LOFT(rank=4),
    "LOFT, gradient and free": LOFT(rank=3, support="gradient", core="free"),
}
every_method = pytest.mark.parametrize("name", [*variants_slow(SPECS), *CALIBRATED])


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
        theirs.data.copy_(ours.data)  # directions too: SVDs of equal weights may differ in sign
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
