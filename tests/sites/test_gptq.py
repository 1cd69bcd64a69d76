"""GPTQ's and AWQ's layers are rotated and trained through; folding them says what it needs."""

import copy

import pytest
import torch
from torch import nn

import oftfx
from oftfx import OFT, MergeError, PlanError, testing
from tests.small import rows

SPEC = OFT(block_size=8, init_std=0.1)
X = rows(torch.float32, 64)


class _Words(nn.Module):
    """Eight 4-bit numbers an int32, a scale and a zero point a group: both libraries' interface."""

    def __init__(self, linear: nn.Linear, group_size: int = 32) -> None:
        super().__init__()
        weight = linear.weight.detach().t().reshape(-1, group_size, linear.out_features)
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scales = (high - low) / 15
        zeros = (-low / scales).round()
        numbers = (
            (weight / scales + zeros).round().clamp(0, 15).int().reshape(-1, 8, weight.shape[-1])
        )
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)[:, None]
        self.group_size = group_size
        self.register_buffer("shifts", shifts)
        self.register_buffer("qweight", (numbers << shifts).sum(1).int())
        self.register_buffer("scales", scales.squeeze(1))
        self.register_buffer("qzeros", zeros.squeeze(1).int())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def floats(self) -> torch.Tensor:
        numbers = (self.qweight[:, None] >> self.shifts) & 15
        numbers = numbers.reshape(-1, self.group_size, self.qweight.shape[-1])
        weight = (numbers - self.qzeros[:, None]) * self.scales[:, None]
        return weight.reshape(-1, self.qweight.shape[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x @ self.floats().to(x.dtype)
        return out if self.bias is None else out + self.bias


class WQLinear_GEMM(_Words):  # noqa: N801
    def __init__(self, linear):
        super().__init__(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features


class QuantLinear(_Words):
    def __init__(self, linear):
        super().__init__(linear)
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features


class InferenceOnly(WQLinear_GEMM):
    """A fused kernel, as far as autograd can see."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


WQLinear_GEMM.__module__ = "awq.modules.linear.gemm"
QuantLinear.__module__ = "auto_gptq.nn_modules.qlinear.qlinear_cuda_old"
LAYERS = {"awq": WQLinear_GEMM, "gptq": QuantLinear}
every_kind = pytest.mark.parametrize("kind", LAYERS)


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    make = LAYERS[kind]
    return nn.Sequential(make(nn.Linear(64, 64)), nn.Tanh(), make(nn.Linear(64, 32, bias=False)))


@every_kind
def test_rotated_and_trained(kind):
    model = base(kind)
    words = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for capture in ("graph", "modules"):
        plan = oftfx.plan(model, SPEC, X, capture)
        assert [(s.fqn, s.kind, s.shape) for s in plan.sites] == [
            ("0", kind, (64, 64)),
            ("2", kind, (32, 64)),
        ]
    testing.assert_identity_at_init(model, OFT(block_size=8), X)
    reference = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32, bias=False))
    for index in (0, 2):
        reference[index].weight.data = model[index].floats().t().contiguous()
    reference[0].bias.data = model[0].bias.clone()
    adapted = oftfx.adapt(copy.deepcopy(model), SPEC, example_inputs=X)
    oftfx.adapt(reference, SPEC, example_inputs=X)
    testing.assert_same_function(adapted, reference, X)
    assert all(torch.equal(buffer, words[name]) for name, buffer in model.named_buffers())
    expected = model(X)
    assert torch.equal(oftfx.remove(adapted)(X), expected)


@every_kind
def test_saved_and_loaded(kind, tmp_path):
    model = oftfx.adapt(base(kind), SPEC, example_inputs=X)
    oftfx.save(model, tmp_path)
    assert torch.equal(oftfx.load(base(kind), tmp_path)(X), model(X))


@every_kind
def test_folding_says_what_it_needs(kind):
    model = oftfx.adapt(base(kind), SPEC, example_inputs=X)
    with pytest.raises(MergeError, match=f"0: folding needs the weight as floats, and {kind}"):
        oftfx.merge(model)
    with pytest.raises(MergeError, match="not quantised anew"):
        oftfx.merge(model, requantize=True)
    assert len(oftfx.parameters(model)) == 2


def test_a_kernel_without_a_gradient_is_refused_by_name():
    model = nn.Sequential(nn.Linear(64, 64), InferenceOnly(nn.Linear(64, 32)))
    with pytest.raises(PlanError, match=r"1: .*awq InferenceOnly gives no gradient to its input"):
        oftfx.adapt(model, SPEC, example_inputs=X)
