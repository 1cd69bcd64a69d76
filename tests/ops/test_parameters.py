"""Ops of parameters alone: schema, fake and autograd; the values are their functions'."""

import pytest
import torch
from torch import fx, nn

import oftfx
from oftfx import HRA, OFT, PSOFT, ops, testing
from oftfx.rotations import cayley

DOUBLE = torch.float64


def skew(*lead: int) -> torch.Tensor:
    return cayley.skew(torch.randn(*lead, 6, dtype=DOUBLE), 4)


CASES = {
    "reflections": (ops.reflections, lambda: torch.randn(4, 6, dtype=DOUBLE)),
    "reflections, batched": (ops.reflections, lambda: torch.randn(2, 3, 4, 6, dtype=DOUBLE)),
    "reflections, in pairs": (ops.reflections, lambda: torch.randn(2, 6).repeat_interleave(2, 0)),
    "norm": (ops.spectral_norm, lambda: skew()),
    "norms": (ops.spectral_norm, lambda: skew(2, 3)),
}
every_case = pytest.mark.parametrize(("op", "make"), CASES.values(), ids=CASES)


@pytest.mark.parametrize(
    ("op", "make"),
    [
        pytest.param(
            *CASES[name], marks=[] if name in ("reflections", "norm") else pytest.mark.slow
        )
        for name in CASES
    ],
    ids=CASES,
)
def test_opcheck(op, make):
    torch.manual_seed(0)
    torch.library.opcheck(op, (make().requires_grad_(),))


@pytest.mark.parametrize("name", ["reflections", "norms"])
def test_gradients_and_their_gradients(name):
    torch.manual_seed(0)
    op, make = CASES[name]
    x = make().requires_grad_()
    assert torch.autograd.gradcheck(op, x)
    assert torch.autograd.gradgradcheck(op, x)


def test_nothing_but_the_parameter_is_kept():
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    u = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.reflections(u)
    assert [tensor.shape for tensor in kept] == [u.shape]


@pytest.mark.parametrize(
    "spec",
    [
        HRA(rank=4, init_std=0.3),
        OFT(block_size=8, init_std=0.3, guard="rescale"),
        OFT(block_size=8, init_std=0.3, guard="exact"),
        PSOFT(rank=6, init_std=0.4, guard="rescale"),
    ],
    ids=["HRA", "OFT, rescaled", "OFT, exact outside", "PSOFT, rescaled"],
)
def test_autocast_takes_no_digits_from_an_adapted_graph(spec):
    """The gradient of the parameters included, whichever matmuls their cores need."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 32, bias=False)).requires_grad_(False)
    graph = oftfx.adapt(fx.symbolic_trace(base), spec)
    x = torch.randn(8, 64)
    inputs = x.bfloat16().float()
    names = {"rotate", "subspace"}
    found = []
    for autocast in (True, False):
        seen = {}

        class Watch(fx.Interpreter):
            def call_function(self, target, args, kwargs, seen=seen):
                if getattr(target, "_opname", "") in names:
                    seen["cores"] = args[1:]
                return super().call_function(target, args, kwargs)

        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            Watch(graph).run(inputs)
        found.append(seen["cores"])
    for ours, exact in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, exact)
    weights = [torch.randn_like(core) for core in found[0]]
    grads = []
    for cores in found:
        total = sum((core * w).sum() for core, w in zip(cores, weights, strict=True))
        wanted = list(testing.thetas(graph).values())
        with torch.autocast("cpu", torch.bfloat16):
            grads.append(torch.autograd.grad(total, wanted, allow_unused=True))
    for ours, exact in zip(*grads, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, exact, rtol=0, atol=0)
