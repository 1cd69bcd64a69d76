"""The real layers of gptqmodel, where it is installed; elsewhere `test_packed.py` stands in."""

import copy

import pytest
import torch
from torch import nn

import oftfx
from oftfx import OFT, MergeError, testing
from tests.small import rows

gptq = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", exc_type=ImportError)
SPEC = OFT(block_size=8, init_std=0.1)
X = rows(torch.float32, 64)
GROUP, LEVELS = 32, 15


@torch.no_grad()
def pair(width: int, out: int, bias: bool) -> tuple[nn.Module, nn.Linear]:
    """A 4-bit layer and the float one of the weight that it stands for."""
    linear = nn.Linear(width, out, bias=bias)
    layer = gptq.TorchLinear(
        bits=4,
        group_size=GROUP,
        sym=False,
        desc_act=False,
        in_features=width,
        out_features=out,
        bias=bias,
        format="gptq_v2",
    )
    groups = linear.weight.reshape(out, -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / LEVELS).half().float()
    zeros = (-low / scales).round().clamp(1, LEVELS)
    groups = (groups / scales[..., None]).round() + zeros[..., None]
    groups = (groups.clamp(0, LEVELS) - zeros[..., None]) * scales[..., None]
    linear.weight.copy_(groups.reshape(out, width))
    group_of = torch.arange(width) // GROUP
    layer.pack(linear, scales, zeros, group_of.int())
    if bias:
        linear.bias.copy_(layer.bias)
    layer.post_init()
    return layer, linear


@pytest.mark.slow  # its import takes a minute
@pytest.mark.parametrize("training", [True, False])
def test_rotated_and_trained(training):
    torch.manual_seed(0)
    (first, one), (second, other) = pair(64, 64, True), pair(64, 32, False)
    model = nn.Sequential(first, nn.Tanh(), second).train(training)
    reference = nn.Sequential(one, nn.Tanh(), other)
    words = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for capture in ("graph", "modules"):
        plan = oftfx.plan(model, SPEC, X, capture)
        assert [(s.fqn, s.kind, s.shape) for s in plan.sites] == [
            ("0", "gptq", (64, 64)),
            ("2", "gptq", (32, 64)),
        ]
    adapted = oftfx.adapt(copy.deepcopy(model), SPEC, example_inputs=X)
    oftfx.adapt(reference, SPEC, example_inputs=X)
    within = 5 * testing.tolerance(torch.float16)  # what it multiplies in
    testing.assert_same_function(adapted, reference, X, within)
    held = dict(adapted.named_buffers())
    assert all(torch.equal(held[name], buffer) for name, buffer in words.items())
    with pytest.raises(MergeError, match="0: folding needs the weight as floats, and gptq"):
        oftfx.merge(adapted)
