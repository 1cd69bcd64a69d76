"""Editing the two kinds of graph that own parameters."""

import io

import pytest
import torch
from torch import fx, nn
from torch.export import export

import oftfx
from oftfx import OFT, testing
from oftfx.host import host_of
from tests.small import Tied, rows, small

x = rows()


@pytest.mark.parametrize("form", ["graph", "program"])
def test_parameters_and_the_nodes_that_read_them(form):
    model = small("functional")
    host = host_of(fx.symbolic_trace(model) if form == "graph" else export(model, (x,)))
    assert set(host.parameters()) == {"up", "down", "weight"}
    assert sorted(host.readers().values()) == ["down", "up", "weight"]


def test_every_name_of_a_tied_weight_is_known():
    graph = fx.symbolic_trace(Tied())
    assert {"a.weight", "b.weight"} <= set(host_of(graph).parameters())


@pytest.mark.parametrize(
    "name", ["fc.oft.default.theta", "oft.default.theta", "deep.er.oft.a.w.theta"]
)
def test_removing_what_was_added_leaves_no_trace(name):
    graph = fx.symbolic_trace(small("functional"))
    before = [name for name, _ in graph.named_modules()], graph.code
    host = host_of(graph)
    node = host.add(name, nn.Parameter(torch.zeros(2)))
    assert name in dict(graph.named_parameters())
    assert host.readers()[node] == name
    host.remove(node, name)
    host.finish()
    assert ([name for name, _ in graph.named_modules()], graph.code) == before


def test_a_program_is_edited_in_a_copy_that_passes_the_verifier_and_survives_saving():
    program = export(small("mlp"), (x,))  # its input is called `input`, like the builtin
    before = str(program)
    adapted = oftfx.adapt(program, OFT(block_size=4, init_std=0.2))
    assert str(program) == before
    adapted.validate()
    buffer = io.BytesIO()
    torch.export.save(adapted, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    testing.assert_same_function(loaded, adapted, x)
    assert adapted.graph_signature.user_inputs == ("input",)


def test_a_programs_keyword_and_dynamic_inputs_survive():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8).double()

        def forward(self, input, *, scale):
            return {"out": self.fc(input) * scale}

    batch = torch.export.Dim("batch")
    shapes = {"input": {0: batch}, "scale": None}
    scale = torch.tensor(2.0, dtype=torch.float64)
    program = export(Keyword(), (x,), {"scale": scale}, dynamic_shapes=shapes)
    adapted = oftfx.adapt(program, OFT(block_size=4))
    for rows_ in (x, x.repeat(3, 1, 1)):
        expected = program.module()(rows_, scale=scale)["out"]
        assert torch.equal(adapted.module()(rows_, scale=scale)["out"], expected)
