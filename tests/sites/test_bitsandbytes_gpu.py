"""What the CPU promises holds on an accelerator, where bitsandbytes runs other kernels."""

import copy

import pytest
import torch
from torch import nn
from torch.export import export

import oftfx
from oftfx import OFT, testing
from tests.quantised import (
    assert_unchanged,
    dequantised,
    float_llama,
    linear4bit,
    linear8bit,
    quantised,
    stored,
)
from tests.small import tokens

pytestmark = pytest.mark.gpu
SPEC = OFT(block_size=8, init_std=0.1)
BATCH = (
    {key: v.cuda() if torch.is_tensor(v) else v for key, v in tokens().items()}
    if (torch.cuda.is_available())
    else {}
)
both_widths = pytest.mark.parametrize("make", [linear4bit, linear8bit], ids=["4 bit", "8 bit"])


def base(make, dtype: torch.dtype = torch.float32) -> nn.Module:
    # Quantised where it runs: `cuda()` of a model would leave int8 rows on the CPU.
    model = quantised(float_llama(dtype), lambda linear: make(linear, device="cuda"))
    return model.cuda().train()


def test_gradients_are_those_of_dequantising_and_rotating():
    model = base(linear4bit)
    adapted = oftfx.adapt(copy.deepcopy(model), SPEC)
    reference = oftfx.adapt(dequantised(model).cuda(), SPEC)
    testing.assert_same_function(adapted, reference, BATCH, within=2e-3)  # TF32-free, fused sums


@both_widths
def test_training_changes_no_byte_and_moves_every_rotation(make):
    model = base(make, torch.bfloat16)
    model(**BATCH)
    before = stored(model)
    oftfx.adapt(model, OFT(block_size=8))
    optimizer = torch.optim.Adam(oftfx.parameters(model), lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(**BATCH, labels=BATCH["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(parameter.abs().sum() > 0 for parameter in oftfx.parameters(model))
    assert_unchanged(model, before)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_without_a_graph_break():
    model = oftfx.adapt(base(linear4bit), SPEC)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    testing.assert_same_function(compiled, model, BATCH, within=1e-3)


@both_widths
def test_merged(make):
    model = oftfx.adapt(base(make, torch.bfloat16), SPEC)
    expected = model(**BATCH).logits
    kept = oftfx.merge(copy.deepcopy(model), report=True, requantize=True)[1]
    assert all(0.9 < site.survived < 1.1 for site in kept.sites)
    merged = oftfx.merge(model)
    within = 0.1 if make is linear8bit else 0.05  # int8 rounds the activations, too
    testing.assert_close(merged(**BATCH).logits, expected, "logits", within)


def test_an_exported_program_trains():
    x = torch.randn(2, 3, 64, device="cuda")
    model = quantised(
        nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)),
        lambda linear: linear4bit(linear).cuda(),
    ).cuda()
    oftfx.adapt(model, SPEC, example_inputs=x)
    program = oftfx.differentiable(export(model, (x,), strict=True))
    testing.assert_same_function(program, model, x, within=1e-3)
    with torch.no_grad():
        program = oftfx.differentiable(export(model, (x,), strict=True))
    testing.assert_same_function(program, model, x, within=1e-3)
