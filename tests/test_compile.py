"""`oftfx.compile(model)`: regional compilation."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import oftfx
from oftfx import OFT, PlanError, testing
from oftfx.compile import layers
from oftfx.modules import rotation
from tests.small import Attention, llama, rows, tokens

SPEC = OFT(block_size=4, init_std=0.2)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Layer(nn.Module):
    """With an index of its own, as the layers of language models have."""

    def __init__(self, index: int, hidden: int = 8) -> None:
        super().__init__()
        self.index = index
        self.up = nn.Linear(8, hidden)
        self.down = nn.Linear(hidden, 8)

    def forward(self, x: Tensor, cache: dict[int, Tensor] | None = None) -> Tensor:
        up = torch.tanh(self.up(x))
        if cache is not None:
            cache[self.index] = up
        return self.down(up)


class Stack(nn.Module):
    def __init__(self, depth: int = 4, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i) for i in range(depth))
        self.head = nn.Linear(8, 3)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, cache: dict[int, Tensor] | None = None) -> Tensor:
        for layer in self.layers:
            run = partial(checkpoint, layer, use_reentrant=False) if self.checkpointed else layer
            x = run(x, cache)
        return self.head(x)


def stack(**options):
    x = rows(torch.float32)
    return oftfx.adapt(Stack(**options), SPEC, example_inputs=x), x


def test_all_layers_train_by_one_graph_and_compute_what_they_did():
    model, x = stack()
    expected = testing.gradients(model, x)
    assert oftfx.compile(model, fullgraph=True) is model
    actual = testing.gradients(model, x)
    for name, gradient in expected.items():
        testing.assert_close(actual[name], gradient, name)
    assert counters["oftfx"]["graphs"] == 1
    assert counters["oftfx"]["rotations"] == 2


def test_compiling_leaves_names_and_parameters_as_they_are():
    model, _ = stack()
    before = dict(model.named_parameters())
    oftfx.compile(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert type(model) is Stack
    assert type(model.layers[0]) is Layer


def test_a_model_without_repeated_layers_is_compiled_whole():
    x = rows(torch.float32)
    model = oftfx.adapt(Attention(), SPEC, example_inputs=x)
    with torch.no_grad():
        expected = model(x)
        testing.assert_close(oftfx.compile(model)(x), expected, "output")
    assert counters["oftfx"]["rotations"] == 4


def test_checkpointed_layers_share_one_graph():
    model, x = stack(checkpointed=True)
    eager = oftfx.adapt(Stack(), SPEC, example_inputs=x)
    eager.load_state_dict(model.state_dict())
    testing.assert_same_function(oftfx.compile(model), eager, x)
    assert counters["oftfx"]["graphs"] <= 2  # the first with and without its input's gradient


def test_other_lengths_cost_one_graph_more():
    model, _ = stack()
    oftfx.compile(model)
    with torch.no_grad():
        for length in (3, 5, 7, 9):
            x = torch.randn(2, length, 8)
            with_graph = model(x)
            with torch.compiler.set_stance("force_eager"):
                testing.assert_close(with_graph, model(x), "output")
    assert counters["oftfx"]["graphs"] == 2


def test_layers_with_a_place_in_a_cache_are_all_compiled():
    depth = 12  # more than Dynamo compiles one function for by itself
    model, x = stack(depth=depth)
    oftfx.compile(model)
    cache: dict[int, Tensor] = {}
    with torch.no_grad():
        model(x, cache)
    assert cache.keys() == set(range(depth))
    assert counters["oftfx"]["graphs"] == depth


def test_layers_of_other_specs_get_graphs_of_their_own():
    spec = dataclasses.replace(SPEC, overrides={r"layers\.1\..*": {"exact": True}})
    x = rows(torch.float32)
    model = oftfx.adapt(Stack(), spec, example_inputs=x)
    expected = testing.gradients(model, x)
    actual = testing.gradients(oftfx.compile(model, fullgraph=True), x)
    for name, gradient in expected.items():
        testing.assert_close(actual[name], gradient, name)
    assert counters["oftfx"]["graphs"] == 2


def test_an_unpickled_model_compiles_where_no_such_rotation_was_made(monkeypatch):
    model, x = stack()
    pickled = pickle.dumps(model)
    monkeypatch.setattr(rotation, "_KNOWN", {})
    with torch.no_grad():
        testing.assert_close(oftfx.compile(pickle.loads(pickled))(x), model(x), "output")


def test_calls_do_not_ask_whether_our_own_code_is_what_it_was():
    model, x = stack()
    with torch.no_grad():
        oftfx.compile(model)(x)
    (entry,) = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(Layer.forward.__code__)
    guards = str(entry.guard_manager)
    assert "'theta'" in guards
    for ours in ("__import_oftfx", "'_made'", "__mro__[1].__dict__)['scaling'] =="):
        assert ours not in guards


def test_calls_ask_for_whatever_may_change():
    """Every change reaches the compiled layers, and so does every way back."""
    model, x = stack()
    oftfx.adapt(model, OFT(block_size=2, init_std=0.2), "second", example_inputs=x)
    oftfx.use(model, "default")
    eager = copy.deepcopy(model)
    oftfx.compile(model, fullgraph=True)

    def both(change: Callable[[nn.Module], object]) -> Tensor:
        change(model)
        change(eager)
        value = model(x)
        testing.assert_close(value, eager(x), "output")
        return value

    with torch.no_grad():
        first = both(lambda m: None)
        others = [
            both(lambda m: oftfx.scale(m, 0.5, "default")),
            both(lambda m: oftfx.use(m, "second")),
            both(lambda m: oftfx.use(m, ["second", "default"])),
            both(lambda m: oftfx.use(m, [])),
        ]
        for i, value in enumerate(others):
            for other in (first, *others[:i]):
                assert not torch.allclose(value, other, atol=1e-4)
        both(lambda m: oftfx.use(m, "default"))
        assert torch.equal(both(lambda m: oftfx.scale(m, 1.0, "default")), first)
        names = ["default", None]
        with oftfx.rows(model, names), oftfx.rows(eager, names):
            testing.assert_close(both(lambda m: None)[1], others[-1][1], "the base's row")
        with oftfx.disabled(model), oftfx.disabled(eager):
            assert torch.equal(both(lambda m: None), others[-1])
        both(oftfx.remove)
        scaled = OFT(block_size=8, init_std=0.2, magnitude=True)
        both(lambda m: oftfx.adapt(m, scaled, example_inputs=x))


def test_a_mode_may_come_with_options():
    model, x = stack()
    oftfx.compile(model, mode="default", options={"group": False})
    with torch.no_grad():
        model(x)
    assert counters["oftfx"]["rotations"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("share_inputs", [False, True])
def test_the_layers_of_a_language_model_train_by_one_graph(share_inputs):
    spec = OFT(block_size=4, init_std=0.1, share_inputs=share_inputs)
    model = oftfx.adapt(llama(layers=4), spec, example_inputs=tokens()).train()
    expected = testing.gradients(model, tokens())
    actual = testing.gradients(oftfx.compile(model, fullgraph=True), tokens())
    for name, gradient in expected.items():
        testing.assert_close(actual[name], gradient, name)
    assert counters["oftfx"]["graphs"] == 2  # the first layer's input needs no gradient
    assert counters["oftfx"]["rotations"] == 14


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "static"])
def test_compiled_layers_generate_what_they_did(cache):
    model = oftfx.adapt(llama(), OFT(block_size=4, init_std=0.1), example_inputs=tokens())
    prompt = tokens()["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(prompt, **options)
    assert torch.equal(oftfx.compile(model).generate(prompt, **options), expected)


@pytest.mark.gpu
def test_layers_train_as_cuda_graphs():
    model, x = stack()
    model, x = model.cuda(), x.cuda()
    expected = testing.gradients(model, x)
    oftfx.compile(model, mode="reduce-overhead")
    for _ in range(4):  # warmed up, recorded, replayed
        torch.compiler.cudagraph_mark_step_begin()
        actual = testing.gradients(model, x)
    for name, gradient in expected.items():
        testing.assert_close(actual[name], gradient, name)
    assert not counters["inductor"]["cudagraph_skips"]


def test_what_is_not_adapted_is_not_compiled():
    x = rows(torch.float32)
    with pytest.raises(PlanError, match="no adapter"):
        oftfx.compile(Stack())
    program = torch.export.export(Stack(), (x,))
    with pytest.raises(PlanError, match="module"):
        oftfx.compile(oftfx.adapt(program, SPEC))


def test_the_layers_are_the_outermost_repeated_ones():
    class Block(nn.Module):
        def __init__(self, hidden: int = 8) -> None:
            super().__init__()
            self.experts = nn.ModuleList([Layer(0, hidden), Layer(1, hidden)])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleList([Block(), Block(), Block(12)])
            self.stages = nn.ModuleList([nn.ModuleList([Layer(0), Layer(1)])])
            self.parts = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            self.frozen = nn.ModuleList([nn.ReLU(), nn.ReLU()])
            self.apart = nn.ModuleList([Layer(0, 8), Layer(0, 12)])

    model = Model()
    oftfx.adapt(model, SPEC, capture="modules")
    assert list(layers(model)) == [*model.encoder, *model.stages[0]]
