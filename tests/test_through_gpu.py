"""On a GPU, too, a backward goes on through what made x: in 16 bits, autocast and 4 bits."""

import contextlib

import pytest
import torch
from torch import Tensor

import oftfx
from oftfx import OFT, readers
from oftfx.modules import fused
from oftfx.producers import Gated, Normed
from tests.quantised import linear4bit, quantised_llama
from tests.small import llama, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda:0")


def models(kind: str):
    if kind == "4 bit":
        return quantised_llama(linear4bit)
    return llama(torch.float32 if kind == "autocast" else torch.bfloat16)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "autocast", "4 bit"])
def test_the_gradients_are_those_of_pytorchs_way(kind, share, monkeypatch):
    spec = OFT(block_size=16, init_std=0.05, share_inputs=share)
    model = oftfx.adapt(models(kind), spec).to(CUDA).train()
    ids = tokens(4, 32)["input_ids"].to(CUDA)
    gone: list[type] = []
    for each in (Gated, Normed):

        def counted(self, *args, real=each.grads):
            gone.append(type(self))
            return real(self, *args)

        monkeypatch.setattr(each, "grads", counted)

    def gradients() -> Tensor:
        model.zero_grad()
        auto = kind != "bf16"
        with torch.autocast("cuda", torch.bfloat16) if auto else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return torch.cat([p.grad.flatten().float() for p in oftfx.parameters(model)])

    found = gradients()
    assert (gone.count(Gated), gone.count(Normed)) == (2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(readers, "through", lambda *_: None)
        patch.setattr(fused, "deferred_through", lambda *_: None)
        expected = gradients()
    assert len(gone) == 5
    # Each way rounds to bf16 at other places, a hundred times in a row.
    assert (found - expected).norm() < 0.03 * expected.norm()
