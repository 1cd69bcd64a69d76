"""4-bit layers that turn their weight while they dequantise it, instead of their input.

On a GPU they do so of themselves, on a CPU in float32 with wide blocks; here nearly all tests make
them, with narrow ones, so that the ops are the same and their kernels plain PyTorch.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import oftfx
from oftfx import OFT, testing
from oftfx.ops.native.binding import library
from oftfx.sites.bitsandbytes import Linear4bit
from tests.quantised import linear4bit, quantised, quantised_llama
from tests.small import rows, tokens

SPEC = OFT(block_size=8, init_std=0.1)


@pytest.fixture
def counted(monkeypatch) -> list[bool]:
    """For each layer that an op rotated and multiplied for, whether in company."""
    calls: list[bool] = []
    real = Linear4bit.rotated_linear

    def run(self, module, x: Tensor, core: Tensor, deferred: bool) -> Tensor:
        calls.append(deferred)
        return real(self, module, x, core, deferred)

    monkeypatch.setattr(Linear4bit, "rotated_linear", run)
    return calls


@pytest.fixture
def fused(counted, monkeypatch) -> list[bool]:
    """The same where all layers do."""
    monkeypatch.setattr(Linear4bit, "fuses", lambda *_: True)
    return counted


def chain(make: Callable[..., nn.Module] = linear4bit) -> nn.Module:
    return quantised(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)), make)


def rotating(model: nn.Module, monkeypatch) -> nn.Module:
    """The model, from now on as it is without the ops."""
    monkeypatch.setattr(Linear4bit, "fuses", lambda *_: False)
    return model


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        OFT(block_size=8, init_std=0.1, share_inputs=True),
        OFT(block_size=8, init_std=0.1, overrides={"k_proj": {"block_size": 16}}),
    ],
    ids=["own rotations", "shared ones", "blocks of two widths"],
)
def test_a_model_computes_what_it_does_otherwise(spec, fused, monkeypatch):
    model = oftfx.adapt(quantised_llama(linear4bit), spec).train()
    values = testing.run(model, tokens()), testing.gradients(model, tokens())
    # A layer of each block has an input of its own twice, and q, k, v and gate, up share theirs.
    assert (fused.count(False), fused.count(True)) == (2 * 2 * 2, 2 * 2 * 5)
    rotating(model, monkeypatch)
    for got, expected in zip(values[0], testing.run(model, tokens()), strict=True):
        testing.assert_close(got, expected, "output")
    for name, expected in testing.gradients(model, tokens()).items():
        testing.assert_close(values[1][name], expected, name)
    assert len(fused) == 28


def test_at_first_it_gives_the_bits_of_its_base(fused):
    testing.assert_identity_at_init(quantised_llama(linear4bit), OFT(block_size=8), tokens())
    model = oftfx.adapt(copy.deepcopy(base := chain()), OFT(block_size=8), capture="modules")
    assert torch.equal(model(rows(torch.float32, 64)), base(rows(torch.float32, 64)))
    assert fused == [False, False]


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_in_the_dtypes_of_the_layer(given, compute, fused, monkeypatch):
    model = chain(lambda linear: linear4bit(linear, compute=compute))
    x = rows(given, 64)
    oftfx.adapt(model, SPEC, capture="modules")
    got = model(x)
    expected = rotating(model, monkeypatch)(x)
    assert got.dtype is given
    assert fused
    worst = max(testing.tolerance(given), testing.tolerance(compute or given))
    testing.assert_close(got, expected, "output", worst)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant, fused):
    model = oftfx.adapt(quantised_llama(linear4bit), SPEC).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    testing.assert_same_function(twin, model, tokens())
    assert fused


def test_under_autocast(fused, monkeypatch):
    model = oftfx.adapt(quantised_llama(linear4bit), SPEC).train()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**tokens()).logits
        assert fused
        expected = rotating(model, monkeypatch)(**tokens()).logits
    testing.assert_close(got, expected, "logits")


def test_blocks_that_are_dropped_are_dropped_from_the_weight(fused):
    model = chain()
    oftfx.adapt(model, OFT(block_size=8, init_std=0.1, dropout=0.5), capture="modules")
    x = rows(torch.float32, 64)
    first, second = model.train()(x), model(x)
    assert not torch.equal(first, second)
    assert torch.equal(model.eval()(x), model(x))


def test_neither_the_turned_input_nor_the_turned_weight_is_kept(fused):
    model = chain()
    oftfx.adapt(model, SPEC, capture="modules")
    x = torch.randn(500, 64, requires_grad=True)
    large = []

    def kept(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel() >= 32 * 64:
            large.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        model[0](x)
    assert set(large) == {x.data_ptr()}


@pytest.mark.parametrize(
    "spec",
    [OFT(block_size=8, share_blocks=True), oftfx.BOFT(block_size=8), oftfx.HRA()],
    ids=lambda spec: type(spec).__name__,
)
def test_other_rotations_turn_the_input(spec, fused):
    model = oftfx.adapt(chain(), spec, capture="modules")
    testing.gradients(model, rows(torch.float32, 64))
    assert not fused


def test_beside_a_rotation_of_another_kind_they_turn_the_input(fused):
    spec = OFT(block_size=8, init_std=0.1, overrides={"k_proj": {"share_blocks": True}})
    model = oftfx.adapt(quantised_llama(linear4bit), spec).train()
    testing.gradients(model, tokens())
    assert fused == [False, True, True, False] * 2  # o, gate, up and down


def test_two_adapters_turn_the_input(fused):
    model = oftfx.adapt(chain(), SPEC, capture="modules")
    oftfx.adapt(model, SPEC, name="second", capture="modules")
    model(rows(torch.float32, 64))
    assert not fused
    with oftfx.disabled(model, "second"):
        model(rows(torch.float32, 64))
    assert fused


def test_without_gradients_and_compiled_the_input_is_turned(fused, fresh_compiler):
    model = oftfx.adapt(chain(), SPEC, capture="modules")
    x = rows(torch.float32, 64)
    with torch.no_grad():
        model(x)
    torch.compile(model, backend="eager", fullgraph=True)(x)
    assert not fused


needs_a_compiler = pytest.mark.skipif(library() is None, reason="no C compiler")


@needs_a_compiler
@pytest.mark.parametrize("rows", [4, 128])
def test_on_a_cpu_they_do_where_it_is_cheaper(rows, counted, monkeypatch):
    """Alone always, as the op has the choice; in company where x is longer than they are wide."""
    given = tokens(2, rows // 2)
    testing.assert_identity_at_init(quantised_llama(linear4bit), OFT(block_size=16), given)
    model = oftfx.adapt(quantised_llama(linear4bit), OFT(block_size=16, init_std=0.1)).train()
    counted.clear()
    got = testing.gradients(model, given)
    # The backward of `down` goes on through the product that it reads.
    assert (counted.count(False), counted.count(True)) == (2, 2 + 2 * 5 * (rows == 128))
    for name, expected in testing.gradients(rotating(model, monkeypatch), given).items():
        testing.assert_close(got[name], expected, name)


@needs_a_compiler
def test_on_a_cpu_layers_that_share_a_rotation_and_16_bits_turn_the_input(counted):
    spec = OFT(block_size=16, init_std=0.1, share_inputs=True)
    testing.gradients(oftfx.adapt(quantised_llama(linear4bit), spec).train(), tokens(2, 64))
    assert counted == [False, True] * 2  # o and down, which share theirs with none
    model = oftfx.adapt(chain(), OFT(block_size=16), capture="modules")
    model(rows(torch.bfloat16, 64))
    assert len(counted) == 4
