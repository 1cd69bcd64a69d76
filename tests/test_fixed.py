"""The tensors that are made once: one weight at a time, counted by a bar."""

import weakref

import torch

import oftfx
from oftfx import PSOFT, fixed
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
