"""Gated products and the rotations that read them become one op, whoever wrote the model."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    NemotronConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
)

import oftfx
from oftfx import OFT, testing
from oftfx.backend import oftfx as backend
from oftfx.ops.rotate import ROTATE
from oftfx.passes import PASSES
from tests.small import tokens

module = sys.modules["oftfx.passes.fuse_glu"]
GLU_ROTATE = module.GLU_ROTATE
SPEC = OFT(block_size=4, init_std=0.2)
WIDTH = 8

pytestmark = pytest.mark.usefixtures("fresh_compiler", "everywhere")


@pytest.fixture
def everywhere(monkeypatch):
    """Fuses where no kernel serves, too: the op is the same on every device."""
    monkeypatch.setattr(module, "_served", lambda rotation, found: True)


class Mlp(nn.Module):
    """Two layers that make gate and up, and one that reads a function of them."""

    def __init__(self, function) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.function = function

    def forward(self, x):
        return self.down(self.function(self.gate(x), self.up(x)))


def adapted(function, dtype=torch.float32):
    model = Mlp(function).to(dtype)
    return oftfx.adapt(model, SPEC, example_inputs=rows(dtype))


def rows(dtype=torch.float32):
    return torch.randn(2, 3, WIDTH).to(dtype)


def left(model, *args, **kwargs) -> tuple[int, list[str]]:
    """How many rotations stay alone after all passes, and which activations are fused."""
    found = []

    def count(graph, inputs):
        for run in PASSES.values():
            run(graph)
        graph.graph.lint()
        fused = graph.graph.find_nodes(op="call_function", target=GLU_ROTATE)
        alone = len(graph.graph.find_nodes(op="call_function", target=ROTATE))
        found.append((alone, [node.args[3] for node in fused]))
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=count, fullgraph=True)(*args, **kwargs)
    torch._dynamo.reset()
    return found[0]


def gelu_new(x):
    return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


MATCHING = {
    "SwiGLU": (lambda g, u: F.silu(g) * u, "silu"),
    "up first": (lambda g, u: u * F.silu(g), "silu"),
    "a module": (lambda g, u: torch.mul(nn.SiLU()(g), u), "silu"),
    "GeGLU": (lambda g, u: F.gelu(g) * u, "gelu"),
    "GeGLU, tanh": (lambda g, u: F.gelu(g, approximate="tanh") * u, "gelu_tanh"),
    "GPT-2's": (lambda g, u: gelu_new(g) * u, "gelu_tanh"),
    "ReGLU": (lambda g, u: F.relu(g).mul(u), "relu"),
    "ReLU squared": (lambda g, u: torch.square(g.relu()) * u, "relu2"),
    "its square as a power": (lambda g, u: F.relu(g) ** 2 * u, "relu2"),
    "no gate": (lambda g, u: F.silu(g + u), "silu"),
    "halves": (lambda g, u: F.silu((h := torch.cat([g, u], -1).chunk(2, -1))[1]) * h[0], "silu"),
    "times itself": (lambda g, u: F.silu(g) * g, "silu"),
    "casts of what is cast": (lambda g, u: (F.silu(g) * u).to(g.dtype), "silu"),
}


@pytest.mark.parametrize(("function", "activation"), MATCHING.values(), ids=MATCHING)
def test_products_and_activations_are_found_in_all_their_spellings(function, activation):
    model, x = adapted(function), rows()
    alone, fused = left(model, x)
    assert fused == [activation]
    assert alone == left(adapted(lambda g, u: torch.tanh(g + u)), x)[0] - 1


def written_between(gate, up):
    gate = gate.clone()
    value = F.silu(gate)
    gate.mul_(2)
    return value * up


OTHERS = {
    "another activation": lambda g, u: F.hardswish(g) * u,
    "in place": lambda g, u: F.silu(g.clone(), inplace=True) * u,
    "broadcast": lambda g, u: F.silu(g) * u[..., :1],
    "a broadcast gate": lambda g, u: F.silu(g[..., :1]) * u,
    "scaled": lambda g, u: F.silu(g) * 2.0,
    "rounded by a cast": lambda g, u: F.silu(g).bfloat16().float() * u,
    "widened": lambda g, u: (F.silu(g) * u.double()).float(),
    "something after it": lambda g, u: torch.tanh(F.silu(g) * u),
    "written to between": written_between,
    "an activation times itself": lambda g, u: (h := F.silu(g)) * h,
    "another constant": lambda g, u: 0.5 * g * (1.0 + torch.tanh(0.8 * (g + 0.044715 * g**3))),
}


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS)
def test_what_only_looks_like_one_stays_as_it_was(function):
    _, fused = left(adapted(function), rows())
    assert fused == []


def test_what_something_else_reads_too_stays_as_it_was():
    class Also(Mlp):
        def forward(self, x):
            h = F.silu(self.gate(x)) * self.up(x)
            return self.down(h) + h

    class Value(Mlp):
        def forward(self, x):
            value = F.silu(self.gate(x))
            return self.down(value * self.up(x)) + value

    for kind in (Also, Value):
        model = oftfx.adapt(kind(None), SPEC, example_inputs=rows())
        assert left(model, rows())[1] == []


def test_the_first_of_two_adapters_is_fused():
    model = adapted(MATCHING["SwiGLU"][0])
    oftfx.adapt(model, SPEC, "second", example_inputs=rows())
    assert left(model, rows())[1] == ["silu"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "halves")) for name in MATCHING],
)
def test_changes_no_value_and_no_gradient(name):
    x = rows()
    model = adapted(MATCHING[name][0])
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    testing.assert_same_function(compiled, model, x)
    assert counters["oftfx"]["fuse_glu"] > 0
    assert counters["oftfx"]["products_left"] == 0


def test_can_be_left_out():
    x = rows()
    model = adapted(MATCHING["SwiGLU"][0])
    with torch.no_grad():
        torch.compile(model, backend=backend, options={"fuse_glu": False}, fullgraph=True)(x)
    assert counters["oftfx"]["graphs"] == 1
    assert counters["oftfx"]["fuse_glu"] == counters["oftfx"]["products_left"] == 0


def test_what_no_kernel_serves_stays_and_is_counted(monkeypatch):
    monkeypatch.undo()
    x = rows()  # on a CPU
    model = adapted(MATCHING["SwiGLU"][0])
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(x)
    assert counters["oftfx"]["fuse_glu"] == 0
    assert counters["oftfx"]["products_left"] == 1


def test_under_autocast():
    x = rows()
    model = adapted(MATCHING["SwiGLU"][0])
    with torch.autocast("cpu", torch.bfloat16):
        assert left(model, x)[1] == ["silu"]
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        testing.assert_close(compiled(x).detach(), model(x).detach(), "output", within=0.02)


def kept(model, x, *passes) -> list[tuple[int, ...]]:
    """Shapes of what a compiled forward computes and keeps for its backward."""
    shapes = []

    def look(traced, _):
        (output,) = traced.graph.find_nodes(op="output")
        nodes = [node for node in output.args[0][1:] if node.op == "call_function"]
        shapes.extend(tuple(node.meta["val"].shape) for node in nodes)
        return make_boxed_func(traced.forward)

    def compiler(graph, inputs):
        for name in passes:
            PASSES[name](graph)
        return aot_autograd(
            fw_compiler=look,
            bw_compiler=lambda traced, _: make_boxed_func(traced.forward),
            partition_fn=min_cut_rematerialization_partition,
        )(graph, inputs)

    torch._dynamo.reset()
    torch.compile(model, backend=compiler, fullgraph=True)(x).sum().backward()
    return shapes


def test_keeps_of_the_products_width_what_the_base_keeps():
    """gate and up; apart, the product as well."""

    def wide(shapes):
        return [shape for shape in shapes if shape[-1] == 3 * WIDTH]

    model = Mlp(MATCHING["SwiGLU"][0])
    model.gate, model.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
    model.down = nn.Linear(3 * WIDTH, WIDTH)
    x = torch.randn(5, WIDTH, requires_grad=True)
    base = wide(kept(model.requires_grad_(False), x))
    assert base == [(5, 3 * WIDTH)] * 2
    oftfx.adapt(model, SPEC, example_inputs=x)
    assert wide(kept(model, x, "group", "fuse_glu")) == base
    assert wide(kept(model, x, "group")) == [*base, (5, 3 * WIDTH)]


def test_lengths_that_change():
    graphs = []

    def keep(graph, inputs):
        graphs.append(module.fuse_glu(graph))
        return graph.forward

    model = adapted(MATCHING["halves"][0])
    compiled = torch.compile(model, backend=keep, fullgraph=True, dynamic=True)
    for length in (3, 5, 8):
        testing.assert_same_function(compiled, model, torch.randn(2, length, WIDTH))
    assert graphs == [1, 1]  # one to run and one to train, for all lengths


SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MLP = {"intermediate_size": 96, "num_key_value_heads": 2}
CONFIGS = {
    "qwen2": (Qwen2Config(**SMALL, **MLP), "silu"),
    "gemma": (GemmaConfig(**SMALL, **MLP, head_dim=16), "gelu_tanh"),
    "phi3": (Phi3Config(**SMALL, **MLP), "silu"),
    "nemotron": (NemotronConfig(**SMALL, **MLP), "relu2"),
    "gpt2": (
        GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2),
        "gelu_tanh",
    ),
    "opt": (OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64), "relu"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("qwen2", "phi3", "gpt2")))
        for name in CONFIGS
    ],
)
def test_models_as_transformers_writes_them(name):
    config, activation = CONFIGS[name]
    model = oftfx.adapt(AutoModelForCausalLM.from_config(config).eval(), SPEC)
    assert left(model, **tokens())[1] == [activation]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "activation"), CONFIGS.values(), ids=CONFIGS)
def test_models_compute_the_same(config, activation):
    model = oftfx.adapt(AutoModelForCausalLM.from_config(config).eval(), SPEC)
    testing.assert_same_function(torch.compile(model, backend=backend), model, tokens())
    assert counters["oftfx"]["fuse_glu"] == counters["oftfx"]["graphs"]
