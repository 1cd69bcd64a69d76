"""Layers whose gradient another library multiplies: their own bits, and who keeps it away."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import oftfx
from oftfx import OFT, testing
from oftfx.ops import frozen_linear
from oftfx.ops.frozen_linear import LEAST_ROWS
from oftfx.ops.native.binding import library
from oftfx.sites import linear
from tests.quantised import linear4bit, quantised, quantised_llama
from tests.small import llama, tokens

SPEC = OFT(block_size=16, init_std=0.1)
X = torch.randn(LEAST_ROWS, 32)

needs_a_compiler = pytest.mark.skipif(library() is None, reason="no C compiler")
pytestmark = pytest.mark.usefixtures("onednn")


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """For each layer that multiplied so, its rows."""
    calls: list[int] = []
    real = linear.frozen_linear

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(x.shape[:-1].numel())
        return real(x, weight, bias)

    monkeypatch.setattr(linear, "frozen_linear", run)
    return calls


@pytest.fixture
def products(monkeypatch) -> list[torch.Size]:
    """The shape of each product that oneDNN gave."""
    shapes: list[torch.Size] = []
    real = frozen_linear._product

    def run(*operands: Tensor) -> Tensor:
        result = real(*operands)
        shapes.append(result.shape)
        return result

    monkeypatch.setattr(frozen_linear, "_product", run)
    return shapes


def chain(**options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48, **options), nn.Tanh(), nn.Linear(48, 32, **options))
    return oftfx.adapt(model, SPEC, capture="modules")


def test_a_model_starts_as_its_base_bit_for_bit(asked):
    base = llama()
    model = oftfx.adapt(copy.deepcopy(base), OFT(block_size=16)).train()
    batch = tokens(2, 20)  # so few that no weight is folded
    for got, wanted in zip(testing.run(model, batch), testing.run(base, batch), strict=True):
        assert torch.equal(got, wanted)
    assert asked == [40] * 14


def test_gradients_are_those_of_the_other_library(asked, monkeypatch):
    def gradients() -> list[Tensor]:
        model = chain()
        x = X.clone().requires_grad_()
        (model(x).sin() * torch.linspace(0, 1, 32)).sum().backward()
        return [x.grad, *(parameter.grad for parameter in oftfx.parameters(model))]

    ours = gradients()
    assert len(asked) == 2
    monkeypatch.setattr(frozen_linear, "is_faster", lambda: False)
    for got, wanted in zip(ours, gradients(), strict=True):
        testing.assert_close(got, wanted, "gradient")
    assert len(asked) == 2


def nothing_is_trained(model: nn.Module) -> None:
    with torch.no_grad():
        model(X)


def the_base_is_asked(model: nn.Module) -> None:
    with oftfx.disabled(model):
        model(X.clone().requires_grad_())


def few_rows(model: nn.Module) -> None:
    model(X[1:])


def sixteen_bits(model: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model(X)


def the_weights_are_trained(model: nn.Module) -> None:
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_()
    model(X)


def a_mode_listens(model: nn.Module) -> None:
    class Listens(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Listens():
        model(X)


def a_transform(model: nn.Module) -> None:
    torch.func.vmap(model)(X[None])


def float64(model: nn.Module) -> None:
    model.double()(X.double())


KEPT = [
    *(nothing_is_trained, the_base_is_asked, few_rows, sixteen_bits),
    *(the_weights_are_trained, a_mode_listens, a_transform, float64),
]


@pytest.mark.parametrize("run", KEPT, ids=lambda run: run.__name__)
def test_where_pytorch_multiplies(run: Callable[[nn.Module], None], asked):
    run(chain())
    assert asked == []


def test_checkpointed(asked):
    model, x = chain(), X.clone().requires_grad_()
    model(x).sin().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(model, x, use_reentrant=False).sin().sum().backward()
    assert torch.equal(x.grad, expected)
    assert len(asked) == 6


def test_what_follows_may_write_to_what_it_gives(asked):
    """With a bias and three axes PyTorch's own result is a view."""
    torch.manual_seed(0)
    layers = nn.Linear(32, 32), nn.ReLU(inplace=True)
    model = oftfx.adapt(nn.Sequential(*layers), SPEC, capture="modules")
    x = X.reshape(2, -1, 32).clone().requires_grad_()
    model(x).sin().sum().backward()
    assert asked == [LEAST_ROWS]
    expected, x.grad = x.grad, None
    torch.relu(model[0](x)).sin().sum().backward()
    assert torch.equal(x.grad, expected)


def test_a_bias_may_be_trained():
    model = chain()
    model[2].bias.requires_grad_()
    model(X).sum().backward()
    torch.testing.assert_close(model[2].bias.grad, torch.full((32,), float(LEAST_ROWS)))


@needs_a_compiler
def test_a_4_bit_layer_too(products):
    """Turned or turning, each layer's gradient is such a product; its output keeps its bits."""
    base = quantised_llama(linear4bit)
    model = oftfx.adapt(copy.deepcopy(base), OFT(block_size=16)).train()
    batch = tokens(2, 64)
    for got, wanted in zip(testing.run(model, batch), testing.run(base, batch), strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert products == []
    ours = testing.gradients(model, batch)
    assert len(products) == 14
    with torch.backends.mkldnn.flags(enabled=False):
        theirs = testing.gradients(model, batch)
    assert len(products) == 14
    for name, gradient in ours.items():
        testing.assert_close(gradient, theirs[name], name)


@needs_a_compiler
def test_second_derivatives_of_4_bit_layers_that_share_a_turned_x(products):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.a(x) * self.b(x)

    torch.manual_seed(0)
    x = torch.randn(LEAST_ROWS, 64, requires_grad=True)
    spec = OFT(block_size=16, share_inputs=True, init_std=0.1)
    model = oftfx.adapt(quantised(Two(), linear4bit), spec, example_inputs=x)

    def second() -> Tensor:
        (first,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    ours = second()
    assert products
    with torch.backends.mkldnn.flags(enabled=False):
        testing.assert_close(ours, second(), "second derivative")
