"""`oftfx::frozen_linear`: another library's product, to the same digits; and what keeps away."""

import platform

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oftfx.ops import frozen_linear
from oftfx.ops.frozen_linear import LEAST_ROWS, gains, is_faster, times

OP = torch.ops.oftfx.frozen_linear.default

pytestmark = pytest.mark.usefixtures("onednn")


def case(*leading: int, width: int = 24, out: int = 40, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(*leading, width, dtype=dtype)
    return x, torch.randn(out, width, dtype=dtype), torch.randn(out, dtype=dtype)


def bound(*factors: Tensor) -> Tensor:
    """What float32 may be off by in each of a product's sums, in any order."""
    first, second = (factor.double().abs() for factor in factors)
    return roundings(first.shape[-1]) * (first @ second.mT)


def roundings(count: int) -> float:
    """The relative error of so many one after the other."""
    return count * 2**-24 / (1 - count * 2**-24)


@st.composite
def cases(draw):
    leading = draw(st.sampled_from([(LEAST_ROWS,), (1, 33), (2, 3, 11), (300,), (4,), (1,), (0,)]))
    width, out = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    x, weight, bias = case(*leading, width=width, out=out)
    layout = draw(st.sampled_from(["contiguous", "columns", "every other", "expanded"]))
    if layout == "columns":
        x = x.mT.contiguous().mT if x.dim() > 1 else x
    elif layout == "every other":
        x = torch.stack([x, x], -1)[..., 0]
        weight = torch.stack([weight, weight], -1)[..., 0]
    elif layout == "expanded":
        x = x[:1].expand_as(x)
    return x, weight, bias if draw(st.booleans()) else None


@given(cases())
def test_value_and_gradient_are_exact_to_the_rounding_of_their_sums(case):
    x, weight, bias = case
    x = x.detach().requires_grad_()
    y = OP(x, weight, bias)
    added = 0 if bias is None else bias.double()
    exact = F.linear(x.double(), weight.double()) + added
    sums = bound(x.detach(), weight)
    assert ((y - exact).abs() <= sums + 2**-24 * (exact.abs() + sums)).all()
    grad = torch.randn(y.shape)
    (dx,) = torch.autograd.grad(y, x, grad)
    off = (dx - grad.double() @ weight.double()).abs()
    assert (off <= bound(grad, weight.mT)).all()
    assert dx.shape == x.shape


@given(cases())
def test_a_layer_keeps_its_bits(case):
    x, weight, bias = case
    y = frozen_linear.frozen_linear(x.detach().requires_grad_(), weight, bias)
    assert torch.equal(y, F.linear(x, weight, bias))


def test_both_take_onednn(monkeypatch):
    """Of the layer's own call, the gradient does."""
    asked = []
    product = frozen_linear._product
    monkeypatch.setattr(frozen_linear, "_product", lambda *a: asked.append(1) or product(*a))
    x, weight, bias = case(LEAST_ROWS)
    x.requires_grad_()
    OP(x, weight, bias).sum().backward()
    assert len(asked) == 2
    frozen_linear.frozen_linear(x, weight, bias).sum().backward()
    assert len(asked) == 3
    times(torch.randn(LEAST_ROWS, 40), weight)
    assert len(asked) == 4


@pytest.mark.parametrize("why", ["few rows", "float64", "meta", "turned off", "MKL is fast"])
def test_where_it_would_not_gain_pytorch_multiplies(why, monkeypatch):
    rows = LEAST_ROWS - (why == "few rows")
    x, weight, bias = case(rows, dtype=torch.float64 if why == "float64" else torch.float32)
    if why == "meta":
        x, weight, bias = (tensor.to("meta") for tensor in (x, weight, bias))
    if why == "turned off":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    if why == "MKL is fast":
        monkeypatch.setattr(frozen_linear, "is_faster", lambda: False)
    assert not gains(x, weight)
    y = OP(x, weight, bias)
    assert why == "meta" or torch.equal(y, F.linear(x, weight, bias))
    assert y.shape == (rows, 40)
    assert times(x, weight.mT).shape == (rows, 40)


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel(R) Xeon(R)"])
@pytest.mark.parametrize("wide", [True, False])
def test_it_gains_on_processors_for_which_mkl_does_without_avx512(name, wide, monkeypatch):
    known = {"cpu_name": name, "avx512_f": wide}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert is_faster.__wrapped__() == (name == "AMD EPYC" and wide and there)


def test_second_derivatives_are_those_of_a_matmul():
    x, weight, bias = case(LEAST_ROWS)
    bias.requires_grad_()

    def second(product) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        value = product(leaf, weight, bias)
        (first,) = torch.autograd.grad(value.sin().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (leaf, bias))

    expected = second(F.linear)
    for product in (OP, frozen_linear.frozen_linear):
        for got, wanted in zip(second(product), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    x, weight, added = case(2, LEAST_ROWS)
    x.requires_grad_()
    torch.library.opcheck(OP, (x, weight, added if bias else None))


def test_a_weight_that_is_trained_is_refused():
    x, weight, bias = case(LEAST_ROWS)
    weight.requires_grad_()
    for product in (OP, frozen_linear.frozen_linear):
        with pytest.raises(RuntimeError, match="the weight requires a gradient"):
            product(x.requires_grad_(), weight, bias)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="MKL is for x86")
def test_pytorch_tells_the_processor():
    """What the rule asks, PyTorch answers."""
    known = torch.cpu.get_capabilities()
    assert known["cpu_name"]
    assert "avx512_f" in known
    assert isinstance(is_faster(), bool)
