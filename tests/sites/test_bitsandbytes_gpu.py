"""What the CPU promises holds on an accelerator, where bitsandbytes runs other kernels.

Tolerances are those of `testing.tolerance`, a count of roundings of the dtype: 256 of float32,
whose products add up in other orders on the two roads, 8 of bfloat16, one a layer in sequence.
Where layers compute in 16 bits, so do the gradients of their rotations, though stored in float32.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import export
from torch.utils.checkpoint import checkpoint

import oftfx
from oftfx import OFT, testing
from oftfx.sites.bitsandbytes import Linear4bit
from tests.quantised import (
    assert_rounded,
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
    return quantised(float_llama(dtype), lambda linear: make(linear, device="cuda")).cuda().train()


def test_gradients_are_those_of_dequantising_and_rotating():
    model = base(linear4bit)
    adapted = oftfx.adapt(copy.deepcopy(model), SPEC)
    reference = oftfx.adapt(dequantised(model).cuda(), SPEC)
    testing.assert_same_function(adapted, reference, BATCH)


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
    testing.assert_same_function(compiled, model, BATCH)


@both_widths
def test_merged(make):
    model = oftfx.adapt(base(make, torch.bfloat16), SPEC)
    expected = model(**BATCH).logits
    kept, report = oftfx.merge(copy.deepcopy(model), report=True, requantize=True)
    folded = oftfx.merge(copy.deepcopy(model), dtype=torch.float32)
    was = dequantised(base(make, torch.bfloat16))
    assert_rounded(report, kept, folded, was, functools.partial(make, device="cuda"))
    merged = oftfx.merge(model)
    within = testing.tolerance(torch.bfloat16)
    if make is linear8bit:  # which rounds 8 inputs, one after another, to a 127th of their largest
        within += 8 * 3 / 127 / 12**0.5  # which is three times their root mean square
    testing.assert_close(merged(**BATCH).logits, expected, "logits", within)


def test_an_exported_program_trains():
    x = torch.randn(2, 3, 64, device="cuda")
    model = quantised(
        nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)),
        lambda linear: linear4bit(linear, device="cuda"),
    ).cuda()
    oftfx.adapt(model, SPEC, example_inputs=x)
    program = oftfx.differentiable(export(model, (x,), strict=True))
    testing.assert_same_function(program, model, x)
    with torch.no_grad():
        program = oftfx.differentiable(export(model, (x,), strict=True))
    testing.assert_same_function(program, model, x)


# --- the rotation inside dequantisation ---


def layer(width: int, out: int, dtype: torch.dtype, double: bool = True) -> nn.Module:
    linear = nn.Linear(width, out).to(dtype)
    return nn.Sequential(linear4bit(linear, double=double, compute=dtype, device="cuda"))


def activations(width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 1024, width, device="cuda", dtype=dtype)


@pytest.fixture
def fused(monkeypatch) -> list[bool]:
    """For each layer that turned its weight, and not its input, whether in company."""
    calls: list[bool] = []
    real = Linear4bit.rotated_linear

    def counted(self, module, x: Tensor, core: Tensor, deferred: bool) -> Tensor:
        calls.append(deferred)
        return real(self, module, x, core, deferred)

    monkeypatch.setattr(Linear4bit, "rotated_linear", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [False, True])
def test_at_first_a_layer_gives_the_bits_of_its_base(double, dtype, fused):
    base, x = layer(192, 256, dtype, double), activations(192, dtype)
    expected = base(x)
    adapted = oftfx.adapt(copy.deepcopy(base), OFT(block_size=32), capture="modules")
    assert torch.equal(adapted(x), expected)
    assert fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_layer_that_rotates_its_weight_computes_the_same(dtype, fused, monkeypatch):
    model, x = layer(192, 256, dtype), activations(192, dtype)
    oftfx.adapt(model, OFT(block_size=32, init_std=0.03), capture="modules")
    got = [*testing.run(model, x), *testing.gradients(model, x).values()]
    assert fused == [False, False]
    monkeypatch.setattr(Linear4bit, "fuses", lambda *_: False)
    expected = [*testing.run(model, x), *testing.gradients(model, x).values()]
    assert fused == [False, False]
    for one, other in zip(got, expected, strict=True):
        testing.assert_close(one, other, "output or gradient", testing.tolerance(dtype))


class Gated(nn.Module):
    """Two layers that read one tensor, and one that reads another."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = {"gate": (192, 256), "up": (192, 256), "down": (256, 192)}
        for name, (width, out) in sizes.items():
            linear = nn.Linear(width, out, bias=False).to(dtype)
            self.add_module(name, linear4bit(linear, compute=dtype, device="cuda"))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_layers_that_read_one_tensor_turn_their_weights(dtype, fused, monkeypatch):
    model, x = Gated(dtype), activations(192, dtype)
    oftfx.adapt(model, OFT(block_size=32, init_std=0.03), example_inputs=x)
    got = [*testing.run(model, x), *testing.gradients(model, x).values()]
    # In 16 bits the backward of `down` goes on through the product that it reads.
    assert fused == [True, True, dtype is not torch.float32] * 2
    monkeypatch.setattr(Linear4bit, "fuses", lambda *_: False)
    expected = [*testing.run(model, x), *testing.gradients(model, x).values()]
    for one, other in zip(got, expected, strict=True):
        testing.assert_close(one, other, "output or gradient", testing.tolerance(dtype))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_and_under_autocast_it_computes_the_same(reentrant, fused):
    model, x = layer(192, 256, torch.bfloat16), activations(192, torch.float32)
    oftfx.adapt(model, OFT(block_size=32, init_std=0.03), capture="modules")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = testing.gradients(model, x)
        got = testing.gradients(Checkpointed(model, reentrant), x)
    assert fused == [False] * (2 if reentrant else 3)  # whose first forward has no gradient
    for name, value in got.items():
        testing.assert_close(value, expected[name.removeprefix("inner.")], name, within=0)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_nothing_is_kept_but_the_input():
    model, x = layer(1024, 1024, torch.bfloat16), activations(1024, torch.bfloat16)
    x.requires_grad_()
    oftfx.adapt(model, OFT(block_size=32), capture="modules")
    model(x).sum().backward()  # kernels are compiled, and libraries have their workspaces
    before = torch.cuda.memory_allocated()
    y = model(x)
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    core = 1024 * 32 * 4
    assert kept < 2 * core
