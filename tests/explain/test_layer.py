"""The boxes of a layer are what was captured of it, in an order in which they can run."""

import pytest
import torch
from torch import fx

import oftfx
from oftfx import OFT, CaptureError
from oftfx.explain.layer import layer_graph
from tests.quantised import linear4bit, quantised_llama
from tests.small import Attention, llama, rows, small

SPEC = OFT(block_size=4, init_std=0.2)
SITES = {"q": "8→8", "k": "8→8", "v": "8→8", "out": "8→8"}


def attention(spec=SPEC):
    return oftfx.adapt(fx.symbolic_trace(Attention()), spec)


def labels(graph, kind=None):
    return [box.label for box in graph.boxes if kind in (None, box.kind)]


def reads(graph):
    return [(box.label, [graph.boxes[i].label for i in box.reads]) for box in graph.boxes]


def test_a_rotation_stands_between_what_it_reads_and_its_site():
    found = layer_graph(attention(), "", SITES)
    assert labels(found, "site") == ["q", "k", "v", "out"]
    assert labels(found, "inserted") == ["rotate"] * 4
    assert dict(reads(found))["q"] == ["rotate"]
    assert ("output", ["add"]) in reads(found)
    assert "x" in dict(reads(found))["add"]
    for i, box in enumerate(found.boxes):
        assert all(source < i for source in box.reads)
    (norm,) = (
        i for i, box in enumerate(found.boxes) if any("= layer_norm(" in n for n in box.nodes)
    )
    rotations = [box for box in found.boxes if box.kind == "inserted"]
    assert [box.reads for box in rotations[:3]] == [(norm,)] * 3
    assert any("cayley" in node for node in rotations[0].nodes)


def test_before_is_the_base():
    found = layer_graph(attention(), "", SITES).before()
    bare = layer_graph(fx.symbolic_trace(Attention()), "", SITES)
    assert reads(found) == reads(bare)


def test_every_kind_of_model_gives_the_same_boxes():
    x = rows(torch.float32)
    module = oftfx.adapt(small("mlp", torch.float32), SPEC, example_inputs=x)
    graph = oftfx.adapt(fx.symbolic_trace(small("mlp", torch.float32)), SPEC)
    program = oftfx.adapt(torch.export.export(small("mlp", torch.float32), (x,)), SPEC)
    sites = {"0": "", "2": ""}
    found = [layer_graph(each, "", sites, x) for each in (module, graph, program)]
    kinds = [[box.kind for box in each.boxes] for each in found]
    assert kinds[0] == kinds[1] == kinds[2]


@pytest.mark.parametrize(
    ("spec", "op"),
    [
        (oftfx.BOFT(block_size=4, factors=2), "rotate ×2"),
        (oftfx.GOFT(), "givens"),
        (oftfx.HRA(rank=2), "subspace"),
    ],
    ids=["BOFT", "GOFT", "HRA"],
)
def test_every_method_is_one_box_a_site(spec, op):
    assert labels(layer_graph(attention(spec), "", SITES), "inserted") == [op] * 4


def test_magnitudes_stand_behind_their_site():
    model = oftfx.adapt(fx.symbolic_trace(small("mlp")), OFT(block_size=4, magnitude=True))
    found = layer_graph(model, "", {"0": "", "2": ""})
    assert labels(found, "inserted") == ["rotate", "scale"] * 2
    assert ("scale", ["0"]) in reads(found)


@pytest.mark.parametrize(
    "make", [llama, lambda: quantised_llama(linear4bit)], ids=["float", "quantised"]
)
def test_one_layer_of_a_model_is_captured_with_its_rotations(make):
    model = oftfx.adapt(make(), OFT(block_size=16))
    sites = {site.fqn: "" for site in oftfx.explain(model).sites}
    found = layer_graph(model, "model.layers.0", sites)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert labels(found, "site") == names
    assert labels(found, "inserted") == ["rotate"] * 7
    assert labels(found, "outside")[-1] == "output"
    assert "self_attn" in labels(found, "other")
    assert oftfx.health(model).norm.numel() == 7 * model.config.num_hidden_layers


def test_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(CaptureError, match="no node of 'layers\\.9'"):
        layer_graph(attention(), "layers.9", SITES)
