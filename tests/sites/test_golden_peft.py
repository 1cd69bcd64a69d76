"""The same base, the same rotations: PEFT computes the same."""

import copy

import pytest
import torch
from peft import OFTConfig, get_peft_model

import oftfx
from oftfx import OFT, sites, testing
from tests.quantised import linear4bit, linear8bit, quantised_llama
from tests.small import tokens

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def pair(make, dtype=torch.float32):
    """One base with PEFT's OFT and with ours; PEFT's default five terms are order 3."""
    base = quantised_llama(make, dtype).train()
    ours = oftfx.adapt(copy.deepcopy(base), OFT(block_size=8, order=3))
    config = OFTConfig(
        oft_block_size=8, r=0, target_modules=TARGETS, use_cayley_neumann=True, bias="none"
    )
    theirs = get_peft_model(base, config).train()
    testing.randomize(ours, std=0.05)
    layers = dict(theirs.named_modules())
    with torch.no_grad():
        for name, theta in testing.thetas(ours).items():
            layer = layers[f"base_model.model.{name.partition('.oft.')[0]}"]
            rotation = layer.oft_R["default"].weight
            assert rotation.shape == theta.shape
            rotation.copy_(theta)
    return ours, theirs, layers


@pytest.mark.parametrize("make", [linear4bit, linear8bit], ids=["nf4", "int8"])
def test_logits_and_gradients(make):
    ours, theirs, layers = pair(make)
    wrapped = layers["base_model.model.model.layers.0.mlp.up_proj"].base_layer
    assert sites.quantiser_of(wrapped) is not None
    outputs = []
    for model in (ours, theirs):
        loss = model(**tokens(), labels=tokens()["input_ids"])
        loss.loss.backward()
        outputs.append(loss.logits)
    testing.assert_close(outputs[0], outputs[1], "logits")
    for name, theta in testing.thetas(ours).items():
        layer = layers[f"base_model.model.{name.partition('.oft.')[0]}"]
        expected = layer.oft_R["default"].weight.grad
        testing.assert_close(theta.grad, expected, name)
