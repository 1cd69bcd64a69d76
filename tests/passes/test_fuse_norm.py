"""Norms and the rotations that read them become one op, whoever wrote the model."""

import importlib

import pytest
import torch
from torch import nn
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

import oftfx
from oftfx import OFT, testing
from oftfx.backend import oftfx as backend
from oftfx.ops.rotate import ROTATE
from oftfx.ops.rotate_group import ROTATE_GROUP
from oftfx.passes.batch_cores import batch_cores
from oftfx.passes.fuse_norm import NORM_ROTATE, fuse_norm
from oftfx.passes.group import group
from tests.small import Attention, llama, tokens

module = importlib.import_module("oftfx.passes.fuse_norm")
SPEC = OFT(block_size=8, init_std=0.2)
WIDTH = 16

pytestmark = pytest.mark.usefixtures("fresh_compiler", "everywhere")
PARTITIONS = lookup_backend("aot_eager_decomp_partition")
"""Decides as inductor does what the backward computes again, and compiles nothing."""


@pytest.fixture
def everywhere(monkeypatch):
    """Fuses where no kernel serves, too: the op is the same on every device."""
    monkeypatch.setattr(module, "_served", lambda rotation, found, readers=1: True)


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Tests of what the passes do need no code."""
    if not request.node.get_closest_marker("slow"):
        partitions = lambda graph, inputs, config_patches: PARTITIONS(graph, inputs)  # noqa: E731
        monkeypatch.setattr("oftfx.backend.lookup_backend", lambda name: partitions)


class Reader(nn.Module):
    """Two layers behind a norm, after one that makes what they norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = norm
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.first(x)
        h = self.norm(x)
        return x + torch.tanh(self.a(h)) * self.b(h)


class Norm(nn.Module):
    """One written by hand."""

    def __init__(self, function) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


def rstd(x):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def t5(x, weight, bias):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + 1e-5))


def deberta(x, weight, bias):
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    return weight * ((h - mean) / torch.sqrt(variance + 1e-5)).to(x.dtype) + bias


NORMS = {
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "RMSNorm, no weight": lambda: nn.RMSNorm(WIDTH, eps=1e-3, elementwise_affine=False),
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "LayerNorm, no bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "LayerNorm, no weight": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "Llama": lambda: Norm(lambda x, w, b: w * (x.float() * rstd(x.float())).to(x.dtype)),
    "Gemma": lambda: Norm(lambda x, w, b: (x.float() * rstd(x.float()) * (1.0 + w)).type_as(x)),
    "T5": lambda: Norm(t5),
    "x·x": lambda: Norm(lambda x, w, b: (x * (x * x).mean(-1, keepdim=True).add(1e-5).rsqrt()) * w),
    "DeBERTa": lambda: Norm(deberta),
    "a bias": lambda: Norm(lambda x, w, b: b + w * (x * rstd(x))),
}
NO_NORMS = {
    "over two axes": lambda: nn.LayerNorm((3, WIDTH)),
    "one number for all": lambda: Norm(lambda x, w, b: x * rstd(x[0]) * w),
    "a weight for each row": lambda: Norm(lambda x, w, b: w[:3, None] * x.tanh()),
    "no norm": lambda: nn.Tanh(),
}


def data(dtype=torch.float32):
    return torch.randn(2, 3, WIDTH).to(dtype)


@pytest.mark.slow
def test_by_inductor():
    model = oftfx.adapt(Reader(NORMS["Llama"]()), SPEC, example_inputs=data())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    testing.assert_same_function(compiled, model, data())
    assert counters["oftfx"]["fuse_norm"] > 0


def left(model, x) -> tuple[int, int, int]:
    """How many norm_rotates, rotations and groups there are after the passes."""
    found = []

    def count(graph, inputs):
        batch_cores(graph)
        group(graph)
        fused = fuse_norm(graph)
        graph.graph.lint()
        nodes = [
            len(graph.graph.find_nodes(op="call_function", target=target))
            for target in (NORM_ROTATE, ROTATE, ROTATE_GROUP)
        ]
        assert fused == nodes[0]
        found.append(tuple(nodes))
        return graph.forward

    call = {"input_ids": x["input_ids"], "use_cache": False} if isinstance(x, dict) else None
    with torch.no_grad():
        compiled = torch.compile(model, backend=count, fullgraph=True)
        compiled(**call) if call else compiled(x)
    return found[0]


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_in_every_spelling(name):
    model = oftfx.adapt(Reader(NORMS[name]()), SPEC, example_inputs=data())
    assert left(model, data()) == (1, 1, 0)


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_is_none_stays(name):
    model = oftfx.adapt(Reader(NO_NORMS[name]()), SPEC, example_inputs=data())
    fused, _, groups = left(model, data())
    assert (fused, groups) == (0, 1)


@pytest.mark.parametrize("name", NORMS)
def test_changes_no_value_and_no_gradient(name):
    model = oftfx.adapt(Reader(NORMS[name]()), SPEC, example_inputs=data())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    testing.assert_same_function(compiled, model, data())
    assert counters["oftfx"]["fuse_norm"] > 0


@pytest.mark.parametrize("name", ["Llama", "LayerNorm"])
@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_rounds_no_more_than_the_pair_did(name, way):
    """Beside float64, in value and gradients, a fused step is no worse than an eager one."""
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    x = data(torch.bfloat16).to(dtype)
    model = oftfx.adapt(Reader(NORMS[name]()).to(dtype), SPEC, example_inputs=x)
    testing.randomize(model, std=0.2)
    exact = Reader(NORMS[name]()).double()
    oftfx.adapt(exact, SPEC, example_inputs=x.double())
    exact.load_state_dict(model.state_dict())

    def step(model, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast" and x.dtype == dtype):
            out = model(x)
        grads = torch.autograd.grad(out.double().square().sum(), list(oftfx.parameters(model)))
        return torch.cat([t.double().flatten() for t in (out.detach(), *grads)])

    reference = step(exact, x.double())
    eager = (step(model, x) - reference).norm()
    fused = (step(torch.compile(model, backend=backend, fullgraph=True), x) - reference).norm()
    assert counters["oftfx"]["fuse_norm"] == 1
    assert fused < 1.2 * eager
    assert eager < 0.05 * reference.norm()


def test_what_else_reads_the_norm_still_does():
    class Router(Reader):
        def forward(self, x):
            h = self.norm(x)
            return self.a(h) * torch.softmax(h[..., :1], 1) + self.b(h) * h

    model = oftfx.adapt(Router(nn.LayerNorm(WIDTH)), SPEC, example_inputs=data())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    testing.assert_same_function(compiled, model, data())
    assert counters["oftfx"]["fuse_norm"] > 0


def test_readers_of_one_rotation_keep_their_gradients_apart():
    """Until the kernel turns them back: the graph has no addition of them."""
    spec = OFT(block_size=8, init_std=0.2, share_inputs=True)
    model = oftfx.adapt(Reader(nn.RMSNorm(WIDTH)), spec, example_inputs=data())
    handed = []

    def count(graph, inputs):
        batch_cores(graph)
        group(graph)
        fuse_norm(graph)
        graph.graph.lint()
        nodes = graph.graph.find_nodes(op="call_function", target=NORM_ROTATE)
        handed.append([(len(node.args[1]), node.args[3], len(node.users)) for node in nodes])
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    testing.assert_same_function(compiled, model, data())
    # Cores, readers and those; without gradients there is nothing to keep apart.
    assert sorted(handed) == [[(1, 1, 1)], [(1, 2, 2)]]


def test_a_trained_norm_stays_the_compilers():
    model = oftfx.adapt(Reader(nn.LayerNorm(WIDTH)), SPEC, example_inputs=data())
    model.norm.requires_grad_(True)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, grads = data(), []
    for one in (model, compiled):
        loss = one(x).square().mean()
        grads.append(torch.autograd.grad(loss, [model.norm.weight, model.norm.bias]))
    assert (counters["oftfx"]["fuse_norm"], counters["oftfx"]["norms_left"]) == (0, 1)
    for value, expected in zip(*grads, strict=True):
        testing.assert_close(value, expected, "gradient")


def test_not_across_what_writes_to_the_tensor():
    class Writes(Reader):
        def forward(self, x):
            x = x + self.first(x)
            h = self.norm(x)
            x.mul_(2)
            return self.a(h) + x

    model = oftfx.adapt(Writes(nn.RMSNorm(WIDTH)), SPEC, example_inputs=data())
    x = data()
    with torch.no_grad():
        value = torch.compile(model, backend=backend, fullgraph=True)(x)
        testing.assert_close(value, model(x), "output")
    assert counters["oftfx"]["fuse_norm"] == 0


def test_not_out_of_what_has_no_gradient():
    class Detaches(Reader):
        def forward(self, x):
            x = x + self.first(x)
            with torch.no_grad():
                h = self.norm(x)
            return self.a(h) + x

    x = data()
    model = oftfx.adapt(Detaches(nn.RMSNorm(WIDTH)), SPEC, example_inputs=x)
    grads = [
        torch.autograd.grad(one(x).square().mean(), list(oftfx.parameters(model))[:2])
        for one in (model, torch.compile(model, backend=backend, fullgraph=True))
    ]
    assert counters["oftfx"]["fuse_norm"] == 0
    for value, expected in zip(*grads, strict=True):
        testing.assert_close(value, expected, "gradient")


def test_enters_the_bodies_of_checkpointed_regions():
    class Checkpointed(Reader):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    model = oftfx.adapt(Checkpointed(nn.RMSNorm(WIDTH)), SPEC, example_inputs=data())
    compiled = torch.compile(model, backend=backend)
    testing.assert_same_function(compiled, model, data())
    assert counters["oftfx"]["fuse_norm"] > 0


def test_may_be_switched_off():
    model = oftfx.adapt(Reader(nn.RMSNorm(WIDTH)), SPEC, example_inputs=data())
    compiled = torch.compile(model, backend=backend, options={"fuse_norm": False})
    testing.assert_same_function(compiled, model, data())
    assert counters["oftfx"]["fuse_norm"] == 0


def test_where_no_kernel_serves_the_compiler_keeps_the_norm(monkeypatch):
    monkeypatch.undo()
    model = oftfx.adapt(Reader(nn.RMSNorm(WIDTH)), SPEC, example_inputs=data())
    with torch.no_grad():
        torch.compile(model, backend=backend)(data())
    assert (counters["oftfx"]["fuse_norm"], counters["oftfx"]["norms_left"]) == (0, 1)


def test_any_number_of_rows():
    model = oftfx.adapt(Reader(nn.LayerNorm(WIDTH)), SPEC, example_inputs=data())
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for length in (3, 5, 8):
        testing.assert_same_function(compiled, model, torch.randn(2, length, WIDTH))
    assert counters["oftfx"]["fuse_norm"] == counters["oftfx"]["graphs"] > 0


def test_a_shape_that_is_read_off_the_tensor():
    """With dynamic sizes it reaches the pass as one node."""
    x = torch.randn(5, WIDTH)
    model = oftfx.adapt(Attention(WIDTH), SPEC, example_inputs=x)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    testing.assert_same_function(compiled, model, x)
    assert counters["oftfx"]["fuse_norm"] == counters["oftfx"]["graphs"] > 0


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    # norms fused; rotations and groups left
    "qwen2": (lambda: Qwen2Config(**SIZES), (2, 2, 0)),
    "qwen3": (lambda: Qwen3Config(**SIZES, head_dim=8), (2, 2, 0)),
    "gemma": (lambda: GemmaConfig(**SIZES, head_dim=8), (2, 2, 0)),
    "phi": (lambda: PhiConfig(**SIZES), (1, 2, 0)),  # one norm for attention and MLP
    "gpt2": (lambda: GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96), (2, 2, 0)),
    "opt": (
        lambda: OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=96,
            word_embed_proj_dim=32,
        ),
        (2, 2, 0),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_language_models(name):
    config, expected = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16).eval()
    assert left(oftfx.adapt(model, SPEC), tokens()) == expected


def test_under_autocast():
    model = oftfx.adapt(llama(), SPEC)
    with torch.autocast("cpu", torch.bfloat16):
        assert left(model, tokens()) == (4, 4, 0)


@pytest.mark.slow
def test_a_language_model_whole_and_layer_by_layer():
    model = oftfx.adapt(llama(), SPEC)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    testing.assert_same_function(compiled, model, tokens())
    assert counters["oftfx"]["fuse_norm"] % 4 == 0
    assert counters["oftfx"]["fuse_norm"]
    torch._dynamo.reset()
    counters.clear()
    by_layer = oftfx.adapt(llama(), SPEC)
    by_layer.load_state_dict(model.state_dict())
    for layer in by_layer.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    testing.assert_same_function(by_layer, model, tokens())
    assert counters["oftfx"]["fuse_norm"] == 2 * counters["oftfx"]["graphs"]


def kept(model, **options) -> int:
    """How many activations of the residual's size a compiled step keeps for its backward."""
    torch._dynamo.reset()
    embedded = torch.randn(2, 10, 64, requires_grad=True)
    compiled = torch.compile(model, backend=backend, options=options, fullgraph=True)
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        compiled(inputs_embeds=embedded, use_cache=False)
    tensors += [embedded]
    return len({t.untyped_storage().data_ptr() for t in tensors if t.numel() == embedded.numel()})


@pytest.mark.slow
def test_keeps_neither_the_norm_nor_what_it_was_turned_to():
    base = kept(llama().requires_grad_(False))
    model = oftfx.adapt(llama(), SPEC)
    assert kept(model) <= base
    assert kept(model, fuse_norm=False) == kept(model) + 4  # a norm before attention and MLP
