"""Encoders of PyTorch's own take no path past an adapted layer."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import oftfx
from oftfx import OFT
from oftfx.fast_path import HELD

SPEC = OFT(block_size=4, init_std=0.2, targets=["linear1", "linear2"])
X = torch.randn(2, 3, 8)


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)


def paths(model: nn.TransformerEncoder) -> list[bool]:
    """Whether an encoder packs its rows, and its layers take the path."""
    return [model.use_nested_tensor, *(bool(one.activation_relu_or_gelu) for one in model.layers)]


@pytest.mark.parametrize("targets", [["linear1", "linear2"], "layers.1.linear1"])
def test_evaluation_computes_what_training_does_and_merging_keeps(targets):
    model = oftfx.adapt(encoder(), replace(SPEC, targets=targets), example_inputs=X)
    mask = torch.tensor([[False] * 3, [False, False, True]])

    def run(encoder: nn.Module) -> torch.Tensor:
        return encoder(X, src_key_padding_mask=mask) * ~mask[..., None]

    evaluated = run(model)
    assert (evaluated - run(encoder())).abs().max() > 1e-3
    torch.testing.assert_close(evaluated, run(model.train()))
    torch.testing.assert_close(evaluated, run(oftfx.merge(copy.deepcopy(model)).eval()))


def test_the_path_is_given_back():
    model = encoder()
    assert all(paths(model))
    for name in "ab":
        oftfx.adapt(model, SPEC, name, example_inputs=X)
    oftfx.remove(model, "a")
    assert not any(paths(model))
    oftfx.remove(model, "b")
    assert all(paths(model))
    assert not any(HELD in vars(module) for module in model.modules())


def test_layers_beside_what_is_adapted_keep_it():
    model = nn.Sequential(nn.Linear(8, 8), encoder())
    oftfx.adapt(model, OFT(block_size=4, targets="0"), example_inputs=X)
    assert all(paths(model[1]))
