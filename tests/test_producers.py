"""What made a tensor is found by pattern, as models write it, and nothing else is taken for it."""

import pytest
import torch
import torch.nn.functional as F

from oftfx.producers import Gated, Normed, producer_of


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def gate_and_up(dtype=torch.float32):
    return leaf(6, 32, dtype=dtype) * 1, leaf(6, 32, dtype=dtype) * 1


def rstd_of(h):
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("first", [True, False])
def test_a_gated_product(name, first, dtype):
    gate, up = gate_and_up(dtype)
    value = ACTIVATIONS[name](gate)
    x = value * up if first else up * value
    found = producer_of(x)
    assert isinstance(found, Gated)
    assert [found.gate is gate, found.up is up, found.activation] == [True, True, name]
    assert torch.equal(found.again(dtype), x)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_alone(name):
    gate, _ = gate_and_up()
    x = ACTIVATIONS[name](gate)
    found = producer_of(x)
    assert isinstance(found, Gated)
    assert [found.gate is gate, found.up, found.activation] == [True, None, name]
    assert torch.equal(found.again(x.dtype), x)


def llama(h, weight):
    wide = h.to(torch.float32)
    return weight * (wide * rstd_of(wide)).to(h.dtype)


def gemma(h, weight):
    wide = h.float()
    return ((wide * rstd_of(wide)) * (1.0 + weight.float())).type_as(h)


def bare(h, weight):
    wide = h.float()
    return (rstd_of(wide) * wide).type_as(h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [llama, gemma, bare])
def test_an_rms_norm(norm, dtype):
    h = leaf(2, 6, 32, dtype=dtype) * 1
    weight = torch.randn(32, dtype=dtype)
    x = norm(h, weight)
    found = producer_of(x)
    assert isinstance(found, Normed)
    assert torch.equal(found.x, h.float())
    torch.testing.assert_close(found.again(dtype), x, rtol=2**-6, atol=0)
    if dtype is torch.float32:
        assert found.x is h
        assert torch.equal(found.again(dtype), x)


H, W = torch.randn(6, 32), torch.randn(32)


def over(h, dims, keepdim=True):
    return torch.rsqrt(h.pow(2).mean(dims, keepdim=keepdim) + 1e-6)


OTHERS = {
    "no product": lambda h, u: h + u,
    "a product of others": lambda h, u: h * u,
    "another activation": lambda h, u: F.softplus(h) * u,
    "an up that is broadcast": lambda h, u: F.silu(h) * u[:1],
    "a gate that is broadcast": lambda h, u: F.silu(h[:1]) * u,
    "a frozen up": lambda h, u: F.silu(h) * u.detach(),
    "a number": lambda h, u: F.silu(h) * 2,
    "a view of a product": lambda h, u: (F.silu(h) * u).view(3, 2, 32),
    "written to": lambda h, u: (F.silu(h) * u).add_(1),
    "no gradient": lambda h, u: (F.silu(h) * u).detach(),
    "a trained weight": lambda h, u: leaf(32) * (h * rstd_of(h)),
    "a norm of columns": lambda h, u: W * (h * over(h, 0)),
    "a norm of everything": lambda h, u: W * (h * over(h, (0, 1))),
    "another's norm": lambda h, u: W * (h * rstd_of(u)),
    "of cubes": lambda h, u: W * (h * torch.rsqrt(h.pow(3).mean(-1, keepdim=True) + 9)),
    "a trained epsilon": lambda h, u: (
        W * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + leaf(1).exp()))
    ),
    "another root": lambda h, u: W * (h * h.pow(2).mean(-1, keepdim=True).sqrt()),
    "a norm rounded before a wider weight": lambda h, u: W * (h * rstd_of(h)).bfloat16(),
    "a copy of a product": lambda h, u: (F.silu(h) * u).to(torch.float32, copy=True),
    "a product in another dtype": lambda h, u: (F.silu(h) * u).bfloat16(),
    "a norm from another device": lambda h, u: (W * (h * rstd_of(h))).to("meta"),
    "a bare norm from another device": lambda h, u: (h * rstd_of(h)).to("meta"),
    "a weight for each row": lambda h, u: torch.randn(6, 1) * (h * rstd_of(h)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_nothing_else_is_taken_for_one(kind):
    assert producer_of(OTHERS[kind](leaf(6, 32) * 1, leaf(6, 32) * 1)) is None


def test_nothing_is_where_somebody_waits_on_the_way():
    gate, up = gate_and_up()
    for name in ("register_hook", "retain_grad"):
        given = (lambda grad: None,) if name == "register_hook" else ()
        x = F.silu(gate) * up
        getattr(x, name)(*given)
        assert producer_of(x) is None
        value = F.silu(gate)
        getattr(value, name)(*given)
        assert producer_of(value * up) is None
        rstd = rstd_of(gate)
        getattr(rstd, name)(*given)
        assert producer_of(W * (gate * rstd)) is None


def test_nothing_is_where_saved_tensors_are_watched():
    gate, up = gate_and_up()
    with torch.autograd.graph.save_on_cpu():
        assert producer_of(F.silu(gate) * up) is None


@pytest.mark.parametrize("kind", ["product", "norm"])
def test_nothing_is_where_they_were_watched_when_it_was_made(kind):
    """To ask a hook for what it keeps may be dear, and would give another tensor."""
    gate, up = gate_and_up()
    asked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, asked.append):
        x = F.silu(gate) * up if kind == "product" else W * (gate * rstd_of(gate))
    assert producer_of(x) is None
    assert not asked


def test_nothing_is_of_a_graph_that_was_let_go():
    gate, up = gate_and_up()
    x = F.silu(gate) * up
    x.sum().backward()
    assert producer_of(x) is None
