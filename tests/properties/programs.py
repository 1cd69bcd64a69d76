"""A small language of models: Hypothesis draws programs in it, and each becomes a model two ways.

    build(program)   an nn.Module that runs the program
    graph_of(model)  the same as a torch.fx graph, built node by node

A program is a list of steps over a growing list of values, of which the first is the input; what
no later step reads is returned. Every layer can be a Linear, a Conv1D, or a bare parameter used by
`F.linear` or `@`; layers can be called twice, share their input, or share their weight.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from oftfx import BOFT, COFT, GOFT, HRA, LOFT, OFT, PSOFT, QGOFT, Spec
from oftfx.rotations import boft

KINDS = ("linear", "conv1d", "functional", "matmul")
# (stream, hidden) with a common divisor; odd ones among them.
WIDTHS = ((4, 6), (6, 9), (9, 15), (8, 12), (10, 15))


@dataclass(frozen=True)
class Layer:
    """A weight: how it is used, its widths, and the layer it shares its weight with."""

    kind: str
    inputs: int
    outputs: int
    tied_to: int | None = None


@dataclass(frozen=True)
class Step:
    """`layer` (apply `layer` to values[a]), `add` or `gate` (values[a] with values[b])."""

    op: str
    a: int
    b: int = 0
    layer: int = 0


@dataclass(frozen=True)
class Program:
    width: int
    layers: tuple[Layer, ...]
    steps: tuple[Step, ...]


@st.composite
def programs(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, max_steps: int = 6) -> Program:
    width, hidden = draw(st.sampled_from(WIDTHS))
    layers: list[Layer] = []
    steps: list[Step] = []
    widths = [width]
    for i in range(draw(st.integers(1, max_steps))):
        a = draw(st.integers(0, len(widths) - 1))
        op = (
            draw(st.sampled_from(("layer", "layer", "again", "tied", "add", "gate")))
            if i
            else "layer"
        )
        partners = [j for j, w in enumerate(widths) if w == widths[a]]
        if op in ("add", "gate"):
            steps.append(Step(op, a, draw(st.sampled_from(partners))))
            widths.append(widths[a])
            continue
        fitting = [j for j, layer in enumerate(layers) if layer.inputs == widths[a]]
        linears = [j for j in fitting if layers[j].kind == "linear" and layers[j].tied_to is None]
        if op == "again" and fitting:
            index = draw(st.sampled_from(fitting))
        elif op == "tied" and linears:
            twin = draw(st.sampled_from(linears))
            layers.append(Layer("linear", widths[a], layers[twin].outputs, twin))
            index = len(layers) - 1
        else:
            outputs = draw(st.sampled_from((width, hidden)))
            layers.append(Layer(draw(st.sampled_from(kinds)), widths[a], outputs))
            index = len(layers) - 1
        steps.append(Step("layer", a, layer=index))
        widths.append(layers[index].outputs)
    return Program(width, tuple(layers), tuple(steps))


class Model(nn.Module):
    """Runs a program."""

    def __init__(self, program: Program, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.program = program
        generator = torch.Generator().manual_seed(0)
        for i, layer in enumerate(program.layers):
            shape = (layer.outputs, layer.inputs)
            value = torch.randn(shape, generator=generator, dtype=torch.float64) / layer.inputs**0.5
            if layer.kind == "linear":
                module = nn.Linear(layer.inputs, layer.outputs)
                module.weight = nn.Parameter(value)
            elif layer.kind == "conv1d":
                module = Conv1D(layer.outputs, layer.inputs)
                module.weight = nn.Parameter(value.T.contiguous())
            else:
                stored = value if layer.kind == "functional" else value.T.contiguous()
                self.register_parameter(f"w{i}", nn.Parameter(stored))
                continue
            nn.init.zeros_(module.bias)
            self.add_module(f"f{i}", module)
        self.to(dtype)
        for i, layer in enumerate(program.layers):
            if layer.tied_to is not None:
                getattr(self, f"f{i}").weight = getattr(self, f"f{layer.tied_to}").weight

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step in self.program.steps:
            a, b = values[step.a], values[step.b]
            if step.op == "add":
                values.append(a + b)
            elif step.op == "gate":
                values.append(a * torch.sigmoid(b))
            else:
                values.append(torch.tanh(self.apply_layer(step.layer, a)))
        return tuple(values[i] for i in unread(self.program))

    def apply_layer(self, index: int, x: Tensor) -> Tensor:
        kind = self.program.layers[index].kind
        if kind == "functional":
            return F.linear(x, getattr(self, f"w{index}"))
        if kind == "matmul":
            return x @ getattr(self, f"w{index}")
        return getattr(self, f"f{index}")(x)


def build(program: Program, dtype: torch.dtype = torch.float64) -> Model:
    return Model(program, dtype).eval()


def unread(program: Program) -> list[int]:
    read = {
        i for step in program.steps for i in (step.a, *((step.b,) if step.op != "layer" else ()))
    }
    return [i + 1 for i in range(len(program.steps)) if i + 1 not in read]


def graph_of(model: Model) -> fx.GraphModule:
    """The program of a model as a graph whose nodes are written one by one."""
    program, graph = model.program, fx.Graph()
    values = [graph.placeholder("x")]
    for step in program.steps:
        a, b = values[step.a], values[step.b]
        if step.op == "add":
            values.append(graph.call_function(torch.add, (a, b)))
        elif step.op == "gate":
            values.append(graph.call_function(torch.mul, (a, graph.call_method("sigmoid", (b,)))))
        else:
            kind = program.layers[step.layer].kind
            if kind in ("linear", "conv1d"):
                out = graph.call_module(f"f{step.layer}", (a,))
            else:
                weight = graph.get_attr(f"w{step.layer}")
                if kind == "functional":
                    out = graph.call_function(F.linear, (a,), {"weight": weight})
                else:
                    out = graph.call_function(torch.matmul, (a, weight))
            values.append(graph.call_function(torch.tanh, (out,)))
    graph.output(tuple(values[i] for i in unread(program)))
    return fx.GraphModule(model, graph).eval()


def rows(program: Program, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 2, program.width, generator=generator, dtype=torch.float64)
    return x.to(dtype)


def divisors(width: int) -> list[int]:
    return [d for d in range(2, width + 1) if width % d == 0]


@st.composite
def specs(
    draw: st.DrawFn,
    program: Program,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    starts: tuple[float, ...] = (0.1,),
) -> Spec:
    """A spec of any method that fits a program."""
    method = draw(st.sampled_from((OFT, OFT, COFT, BOFT, GOFT, QGOFT, HRA, PSOFT, LOFT)))
    share = draw(st.booleans())
    shared: dict[str, Any] = {
        "share_inputs": share,
        "dtype": draw(st.sampled_from(dtypes)),
        "seed": draw(st.integers(0, 3)),
        "init_std": draw(st.sampled_from(starts)),
    }
    widths = [layer.inputs for layer in program.layers]
    if method is HRA:
        return HRA(rank=draw(st.sampled_from(range(2, min(widths) + 1, 2))), **shared)
    if method in (GOFT, QGOFT):
        return method(scale=draw(st.booleans()), **shared)
    skew = {
        "order": draw(st.integers(1, 6)),
        "exact": draw(st.booleans()),
        "guard": draw(st.sampled_from((None, "rescale", "exact"))),
        "unit_rate": draw(st.booleans()),
    }
    if shared["init_std"] and (skew["exact"] or skew["guard"]):  # far only where it is guarded
        shared["init_std"] *= draw(st.sampled_from((1, 5)))
    if method in (PSOFT, LOFT):
        rank = draw(st.integers(2, min(widths)))
        if method is PSOFT:
            return PSOFT(rank=rank, relaxed=draw(st.booleans()), **skew, **shared)
        support = draw(st.sampled_from(("principal", "random", "coordinate")))
        core = draw(st.sampled_from(("orthogonal", "free")))
        return LOFT(rank=rank, support=support, core=core, **skew, **shared)
    common = math.gcd(*widths)
    own = {
        "block_size": draw(st.sampled_from(divisors(common))),
        "share_blocks": draw(st.booleans()),
        "magnitude": draw(st.booleans()),
        **skew,
    }
    if method is BOFT:
        fitting = [
            BOFT(**own, **shared, factors=m)
            for m in (1, 2, 3)
            if m == 1 or own["block_size"] % 2 == 0
        ]
        return draw(st.sampled_from([spec for spec in fitting if not boft.misfit(spec, common)]))
    overrides = {}
    if not share:  # sites that share a rotation must agree on its fields
        for i, layer in enumerate(program.layers):
            if draw(st.integers(0, 3)) == 0:
                name = f"f{i}" if layer.kind in ("linear", "conv1d") else f"w{i}"
                overrides[name] = {"block_size": draw(st.sampled_from(divisors(layer.inputs)))}
    return method(overrides=overrides, **own, **shared)


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, **options) -> tuple[Program, Spec]:
    """A program and a spec that fits it."""
    program = draw(programs(kinds))
    return program, draw(specs(program, **options))
