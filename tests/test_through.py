"""A backward goes on through what made x, with the gradients that PyTorch gives; where somebody
waits for a gradient on the way, it takes PyTorch's way."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, GemmaConfig, GemmaForCausalLM

import oftfx
from oftfx import OFT, readers, testing, through
from oftfx.ops.native.binding import library
from oftfx.producers import Gated, Normed, producer_of
from tests.small import llama, tokens

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")
SPEC = OFT(block_size=16, init_std=0.1)


@pytest.fixture
def gone(monkeypatch) -> list[str]:
    """For each backward that went through, what kind of producer."""
    calls: list[str] = []
    for kind in (Gated, Normed):
        real = kind.grads

        def counted(self, *args, real=real):
            calls.append(type(self).__name__)
            return real(self, *args)

        monkeypatch.setattr(kind, "grads", counted)
    return calls


def without(monkeypatch, run):
    """What `run` gives where nothing goes through."""
    with monkeypatch.context() as patch:
        patch.setattr(readers, "through", lambda *_: None)
        return run()


def gemma():
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
    )
    return GemmaForCausalLM(config).eval()


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config).eval()


# Of the first layer's norm nothing is trained before it. BERT's norms are PyTorch's own.
MODELS = {
    "llama": (llama, {"Gated": 2, "Normed": 3}),
    "gemma": (gemma, {"Gated": 2, "Normed": 3}),
    "bert": (bert, {"Gated": 2, "Normed": 0}),
}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_are_pytorchs(name, share, gone, monkeypatch):
    build, expected_calls = MODELS[name]
    spec = OFT(block_size=16, init_std=0.1, share_inputs=share)
    model = oftfx.adapt(build(), spec).train()
    given = tokens()
    if name == "bert":
        given = {"input_ids": given["input_ids"]}
    got = testing.gradients(model, given)
    assert {kind: gone.count(kind) for kind in expected_calls} == expected_calls
    expected = without(monkeypatch, lambda: testing.gradients(model, given))
    assert len(gone) == sum(expected_calls.values())
    for parameter, value in expected.items():
        testing.assert_close(got[parameter], value, parameter)


class Layer(nn.Module):
    """A gated layer behind a norm, whose steps in between a test can reach."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.before = nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, 48), nn.Linear(width, 48)
        self.act = nn.SiLU()
        self.down = nn.Linear(48, width)
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.before(x)
        normed = self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
        return h + self.down(self.act(self.gate(normed)) * self.up(normed))


def layer() -> nn.Module:
    torch.manual_seed(0)
    return oftfx.adapt(Layer(), SPEC, example_inputs=(given(),)).train()


def given(rows: int = 10) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def of_trained(model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(model(given()).square().sum(), trained(model)))


def check(got, expected):
    """In the 2-norm: gradients of gradients have entries a thousandth of their neighbours."""
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        testing.assert_close(ours, theirs, f"gradient {i}", within=1e-6)


def test_a_layer_goes_through_both(gone, monkeypatch):
    model = layer()
    check(of_trained(model), without(monkeypatch, lambda: of_trained(model)))
    assert sorted(gone) == ["Gated", "Normed"]


def kept(loss: Tensor) -> dict[int, torch.Size]:
    """The memory that a graph keeps for its backward: by address, the shape of a tensor there."""
    found: dict[int, torch.Size] = {}
    nodes = [loss.grad_fn]
    for node in nodes:
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in (*saved, *getattr(node, "saved_tensors", ())):
            if isinstance(value, Tensor):
                found[value.untyped_storage().data_ptr()] = value.shape
        nodes += [each for each, _ in node.next_functions if each and each not in nodes]
    return found


def test_of_activations_only_what_the_base_keeps_is_kept():
    model = layer()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def activations() -> list[torch.Size]:
        found = kept(model(given().requires_grad_()).sum())
        return sorted(shape for place, shape in found.items() if place not in own)

    with_rotations = activations()
    with oftfx.disabled(model):
        base = activations()
    cores = [torch.Size([n, 16, 16]) for n in (2, 2, 2, 3)]
    # And x itself, which no producer made.
    assert with_rotations == sorted([*base, *cores, given().shape])


def hooked(model, place: str, what: str) -> list[Tensor]:
    """Registers a hook, from a module's hook, on a tensor that nobody keeps."""
    seen: list[Tensor] = []
    module = model.get_submodule(place)

    def before(_, args):
        args[0].register_hook(seen.append)

    def after(_, args, out):
        (out if what == "output" else args[0]).register_hook(seen.append)

    if what == "input, before":
        module.register_forward_pre_hook(before)
    else:
        module.register_forward_hook(after)
    return seen


PLACES = [
    ("down", "input, before"),
    ("down", "input, after"),
    ("act", "output"),
    ("act", "input, after"),
    ("gate", "input, before"),
    ("gate", "input, after"),
    ("up", "output"),
]


@pytest.mark.parametrize(("place", "what"), PLACES)
def test_a_hook_sees_the_gradient_it_waits_for(place, what, monkeypatch):
    model = layer()
    seen = hooked(model, place, what)
    got = of_trained(model)
    (ours,) = seen
    seen.clear()
    expected = without(monkeypatch, lambda: of_trained(model))
    check([ours, *got], [*seen, *expected])


@pytest.mark.parametrize(("place", "what"), PLACES)
@pytest.mark.parametrize("with_parameters", [False, True])
def test_a_tensor_on_the_way_can_be_asked_for_its_gradient(
    place, what, with_parameters, monkeypatch
):
    model = layer()
    held: list[Tensor] = []

    def keep(_, args, out):
        held.append(out if what == "output" else args[0])

    model.get_submodule(place).register_forward_hook(keep)

    def asked() -> list[Tensor]:
        held.clear()
        loss = model(given()).square().sum()
        wanted = held + (trained(model) if with_parameters else [])
        return list(torch.autograd.grad(loss, wanted))

    check(asked(), without(monkeypatch, asked))


def test_a_kept_gradient_is_kept(monkeypatch):
    model = layer()
    held: list[Tensor] = []
    model.down.register_forward_hook(lambda _, args, out: held.append(args[0]))

    def run() -> list[Tensor]:
        held.clear()
        loss = model(given()).square().sum()
        held[0].retain_grad()
        loss.backward()
        return [held[0].grad]

    check(run(), without(monkeypatch, run))


def test_the_rows_factor_of_a_norm_that_is_held_has_its_gradient(monkeypatch):
    held: list[Tensor] = []

    class Tapped(Layer):
        def forward(self, x: Tensor) -> Tensor:
            h = x + self.before(x)
            rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            held.append(rstd)
            return h + self.down(torch.cat([self.gate(self.weight * (h * rstd))], -1))

    torch.manual_seed(0)
    model = oftfx.adapt(Tapped(), SPEC, example_inputs=(given(),)).train()

    def asked() -> list[Tensor]:
        held.clear()
        return list(torch.autograd.grad(model(given()).square().sum(), held))

    check(asked(), without(monkeypatch, asked))


def test_what_is_held_is_told_also_after_a_first_backward_under_hooks(monkeypatch):
    through._held_by_a_graph.cache_clear()
    model = layer()
    loss = model(given()).sum()
    with torch.autograd.graph.save_on_cpu():
        loss.backward()
    held: list[Tensor] = []
    model.act.register_forward_hook(lambda _, args, out: held.append(out))
    (grad,) = torch.autograd.grad(model(given()).sum(), held)
    assert grad.shape == held[0].shape


def test_gradients_of_gradients_are_pytorchs(monkeypatch):
    model = layer()

    def twice() -> list[Tensor]:
        x = given().requires_grad_()
        parameters = trained(model)
        first = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
        loss = sum(grad.square().sum() for grad in first)
        return list(torch.autograd.grad(loss, [x, *parameters]))

    check(twice(), without(monkeypatch, twice))


def test_a_graph_that_is_kept_gives_the_same_again():
    model = layer()
    loss = model(given()).square().sum()
    first = torch.autograd.grad(loss, trained(model), retain_graph=True)
    again = torch.autograd.grad(loss, trained(model))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant, monkeypatch):
    model = layer()

    def run() -> list[Tensor]:
        x = given().requires_grad_()
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
        model.zero_grad()
        loss.backward()
        return [x.grad, *(p.grad.clone() for p in trained(model))]

    check(run(), without(monkeypatch, run))


def test_what_else_reads_the_tensors_counts_too(monkeypatch):
    """A trained layer beside the rotations, and the output, read the norm and the product."""

    class Beside(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.beside = nn.Parameter(torch.randn(32))

        def forward(self, x: Tensor) -> Tensor:
            h = x + self.before(x)
            normed = self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
            value = self.act(self.gate(normed))
            product = value * self.up(normed)
            return self.down(product) + normed * self.beside + product[:, :32] + value[:, :32]

    torch.manual_seed(0)
    model = oftfx.adapt(Beside(), SPEC, example_inputs=(given(),)).train()
    model.beside.requires_grad_()
    check(of_trained(model), without(monkeypatch, lambda: of_trained(model)))


def test_rotations_that_are_frozen_pass_the_gradient_on(gone, monkeypatch):
    model = layer()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("before.oft" in name)
    check(of_trained(model), without(monkeypatch, lambda: of_trained(model)))
    assert sorted(gone) == ["Gated", "Normed"]


def test_under_autocast_what_made_the_wider_tensor(gone, monkeypatch):
    model = layer()

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(given())
        return list(torch.autograd.grad(out.float().square().sum(), trained(model)))

    # 16 bits have no kernel on a CPU; what is found must not be taken for float32.
    for ours, theirs in zip(run(), without(monkeypatch, run), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not gone


def test_nothing_outlives_its_backward():
    model = layer()
    gc.collect()
    gc.disable()
    try:
        x = given().requires_grad_()
        middle: list[weakref.ref] = []
        model.down.register_forward_hook(lambda _, args, out: middle.append(weakref.ref(args[0])))
        model.act.register_forward_hook(lambda _, args, out: middle.append(weakref.ref(out)))
        model(x).sum().backward()
        assert [held() for held in middle] == [None, None]
    finally:
        gc.enable()


def test_what_is_held_is_told_from_what_only_the_graph_keeps():
    gate, up = (torch.randn(3, 4, requires_grad=True) * 1 for _ in range(2))
    value = F.silu(gate)
    x = value * up
    between = through._Between(x, producer_of(x))
    assert between.awaited()
    gradient = x.grad_fn
    del x
    assert between.awaited()  # of the activation
    del value
    assert not between.awaited()
    assert gradient is not None
