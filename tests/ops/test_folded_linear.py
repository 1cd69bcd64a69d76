"""`oftfx::folded_linear`: folding and multiplying, in value and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oftfx import ops
from oftfx.ops.fold import core_grad

OP = torch.ops.oftfx.folded_linear.default
GRAD = torch.ops.oftfx.folded_linear_grad.default


def reference(x: Tensor, core: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What it stands for: x rotated, and the layer's own matmul."""
    return F.linear(ops.rotate(x, core), weight, bias)


def case(rows: int = 40, n: int = 2, b: int = 8, out: int = 24, dtype=torch.float32):
    core = 0.3 / b**0.5 * torch.randn(n, b, b, dtype=dtype)
    x = torch.randn(rows, n * b, dtype=dtype)
    return x, core, torch.randn(out, n * b, dtype=dtype), torch.randn(out, dtype=dtype)


@st.composite
def cases(draw):
    """Any shape: odd sizes, one core for all, rows of several axes, and none."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    b, n, out = draw(st.integers(2, 7)), draw(st.integers(1, 6)), draw(st.integers(1, 12))
    leading = draw(st.sampled_from([(), (1,), (4,), (2, 9), (0,)]))
    core = 0.2 * torch.randn(draw(st.sampled_from([1, n])), b, b, dtype=torch.float64)
    bias = torch.randn(out, dtype=torch.float64) if draw(st.booleans()) else None
    weight = torch.randn(out, n * b, dtype=torch.float64)
    return torch.randn(*leading, n * b, dtype=torch.float64), core, weight, bias


@given(cases())
def test_value_and_gradients_are_those_of_rotating_x(case):
    x, core, _, bias = case
    leaves = [leaf.requires_grad_() for leaf in (x, core, bias) if leaf is not None]
    value, expected = ops.folded_linear(*case), reference(*case)
    torch.testing.assert_close(value, expected)
    grad = torch.randn_like(expected)
    ours = torch.autograd.grad(value, leaves, grad)
    for got, wanted in zip(ours, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("b", [16, 20, 32], ids=["native", "PyTorch", "native"])
def test_in_float32_both_are_as_near_to_float64(b):
    """Folding changes the rounding only: a bound of its sums, in value and every gradient."""
    x, core, weight, bias = case(300, 3, b, 24)
    exact = [tensor.double() for tensor in (x, core, weight, bias)]
    grad = torch.randn(300, 24)

    def error(run, dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [tensor.to(dtype).requires_grad_(i < 2) for i, tensor in enumerate(exact)]
        value = run(*leaves)
        return [value, *torch.autograd.grad(value, leaves[:2], grad.to(dtype))]

    expected = error(reference, torch.float64)
    for got, wanted in zip(error(ops.folded_linear, torch.float32), expected, strict=True):
        assert (got.double() - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("b", [8, 16])
def test_the_forward_has_the_bits_of_the_merged_layer(b, dtype):
    """Merging folds in the wider dtype and rounds to the weight's."""
    x, core, weight, bias = (tensor.to(dtype) for tensor in case(b=b))
    core = core.float()
    merged = ops.rotate(weight.float(), core.mT).to(dtype)
    expected = F.linear(x, merged, bias)
    assert torch.equal(ops.folded_linear(x, core, weight, bias), expected)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_the_gradient_is_exact_for_a_series_that_is_no_rotation(order):
    """``R`` itself in place of ``R⁻ᵀ`` would be wrong in the first digits here."""
    theta = 0.3 * torch.randn(2, 28, dtype=torch.float64)
    x, _, weight, bias = case(dtype=torch.float64)
    core = ops.cayley(theta, 8, order).requires_grad_()
    assert (core + core.mT + core @ core.mT).norm() > 1e-3
    (got,) = torch.autograd.grad(ops.folded_linear(x, core, weight, bias).sin().sum(), core)
    (wanted,) = torch.autograd.grad(reference(x, core, weight, bias).sin().sum(), core)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_gradcheck_and_gradgradcheck():
    x, core, weight, bias = case(9, 2, 3, 5, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, core, bias)]

    def run(x, core, bias):
        return ops.folded_linear(x, core, weight, bias)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, core, weight, bias = case(5, 3, 4, 8)
    x, weight = x.to(dtype), weight.to(dtype)
    torch.library.opcheck(OP, (x.requires_grad_(), core.requires_grad_(), weight, bias))
    grad, x, core = torch.randn(5, 8, dtype=dtype), x.detach(), core.detach()
    for need_core in (True, False):
        torch.library.opcheck(GRAD, (grad, x, core, weight, weight.clone(), need_core))


@pytest.mark.parametrize("frozen", ["x", "core"])
def test_only_what_is_wanted_is_computed(frozen):
    x, core, weight, bias = case()
    wanted = core if frozen == "x" else x
    wanted.requires_grad_()
    ops.folded_linear(x, core, weight, bias).sum().backward()
    assert (x.grad is None) is (frozen == "x")
    assert (core.grad is None) is (frozen == "core")


def test_keeps_x_the_core_the_weight_and_what_it_was_folded_to():
    x, core, weight, _ = case()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.folded_linear(x.requires_grad_(), core.requires_grad_(), weight)
    known = {tensor.data_ptr() for tensor in (x, core, weight)}
    (folded,) = (tensor for tensor in kept if tensor.data_ptr() not in known)
    assert len(kept) == 4
    assert torch.equal(folded, ops.rotate(weight, core.mT))


def test_a_weight_that_is_trained_is_refused():
    x, core, weight, _ = case()
    with pytest.raises(RuntimeError, match=r"only a frozen one is folded"):
        ops.folded_linear(x, core, weight.requires_grad_())


def test_compiled_without_a_graph_break(fresh_compiler):
    x, core, weight, bias = case()
    core.requires_grad_()

    def step(x, core):
        return ops.folded_linear(x, core, weight, bias).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x, core), core)
    torch.testing.assert_close(got, torch.autograd.grad(step(x, core), core)[0])


def test_under_autocast_it_computes_as_given():
    x, core, weight, bias = case()
    expected = ops.folded_linear(x, core.requires_grad_(), weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.folded_linear(x, core, weight, bias), expected)


def test_without_a_rotation_it_is_the_plain_matmul():
    x, core, weight, bias = case(b=16)
    expected = F.linear(x, weight, bias)
    assert torch.equal(ops.folded_linear(x, torch.zeros_like(core), weight, bias), expected)


@pytest.mark.parametrize(("width", "n"), [(12, 2), (16, 3)])
def test_misfits_are_refused(width, n):
    with pytest.raises(RuntimeError, match=r"oftfx::folded_linear.*do not fit"):
        ops.folded_linear(torch.randn(3, width), torch.zeros(n, 8, 8), torch.randn(24, 16))


@pytest.mark.parametrize(("rows", "n", "b"), [(37, 3, 16), (520, 2, 48), (0, 2, 16), (300, 1, 256)])
def test_a_cores_gradient_is_divided_in_float32s_digits(rows, n, b):
    """Also where the rows are cut into runs, and there are none."""
    x, grad = torch.randn(rows, n * b), torch.randn(rows, n * b)
    core = 0.3 * torch.randn(n, b, b) / b**0.5
    got = core_grad(grad, x, core)
    expected = core_grad(grad.double(), x.double(), core.double())
    assert (got - expected).norm() <= 1e-5 * expected.norm() + 1e-30
