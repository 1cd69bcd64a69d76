"""The tensors that are made once: of weights of every kind, one at a time, counted by a bar."""

import copy
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import oftfx
from oftfx import LOFT, PSOFT, fixed
from oftfx.rotations import supports
from tests.small import rows, small


def test_one_weight_at_a_time_is_in_floats(monkeypatch):
    """Of weights that are stored in less, and of those that one rotation stands before."""
    made, find = [], supports.principal

    def watched(weight, rank, generator):
        assert weight.dtype == torch.float32
        assert all(earlier() is None for earlier in made)
        made.append(weakref.ref(weight))
        return find(weight, rank, generator)

    monkeypatch.setattr(supports, "principal", watched)
    x = rows(torch.bfloat16)
    for share, count in ((False, 4), (True, 2)):
        model = small("attention", torch.bfloat16)
        oftfx.adapt(model, PSOFT(rank=3, share_inputs=share), example_inputs=x)
        assert len(made) == count
        made.clear()


def test_a_bar_counts_the_sites(monkeypatch):
    seen = []

    def tracked(items, what):
        seen.append((len(items), what))
        return items

    monkeypatch.setattr(fixed, "tracked", tracked)
    oftfx.adapt(small("attention"), PSOFT(rank=3), example_inputs=rows())
    assert seen == [(4, "finding directions")]


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("spec", [PSOFT(rank=3), LOFT(rank=2, support="principal")])
def test_of_layers_in_shards_the_directions_are_those_of_the_whole_weights(spec, process_group):
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(3, 8)
    whole = oftfx.adapt(copy.deepcopy(model), spec, example_inputs=x)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    oftfx.adapt(model, spec, capture="modules")
    assert torch.equal(model(x), whole(x))
    for i in (0, 2):
        assert torch.equal(model[i].oft.default.support, whole[i].oft.default.support)
