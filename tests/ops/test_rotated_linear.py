"""`oftfx::rotated_linear`: dequantising, rotating and multiplying, in value and every gradient."""

import itertools

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oftfx import ops
from oftfx.ops import packed
from oftfx.ops.cost import folds_packed
from oftfx.ops.packed import Packed
from tests.packed import quantised, random_packed

OP = torch.ops.oftfx.rotated_linear.default
GRAD = torch.ops.oftfx.rotated_linear_grad.default
CPU = torch.device("cpu")


def reference(x: Tensor, core: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """What autograd sees: the dequantised weight, and a matmul for each block."""
    b = core.shape[-1]
    turn = torch.eye(b, dtype=x.dtype) + core.to(x.dtype)
    blocks = x.unflatten(-1, (-1, b)).unsqueeze(-2) @ turn.expand(x.shape[-1] // b, b, b)
    return F.linear(blocks.squeeze(-2).flatten(-2), packed.dequantised(weight, x.dtype), bias)


@st.composite
def cases(draw):
    """Any shape: blocks of W and of the core that do not meet, odd sizes, few rows and many."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    b, n, out = draw(st.integers(2, 7)), draw(st.integers(1, 6)), draw(st.integers(1, 12))
    weight = random_packed(
        out,
        n * b,
        draw(st.sampled_from(["nf4", "fp4"])),
        draw(st.sampled_from([4, 32, 64])),
        draw(st.booleans()),
    )
    leading = draw(st.sampled_from([(), (1,), (4,), (2, 9), (0,)]))
    core = 0.2 * torch.randn(draw(st.sampled_from([1, n])), b, b, dtype=torch.float64)
    bias = torch.randn(out, dtype=torch.float64) if draw(st.booleans()) else None
    return torch.randn(*leading, n * b, dtype=torch.float64), core, weight, bias


@given(cases())
def test_value_and_gradients_are_those_of_dequantising_and_rotating(case):
    x, core, weight, bias = case
    leaves = [leaf.requires_grad_() for leaf in (x, core, bias) if leaf is not None]
    value, expected = ops.rotated_linear(x, core, weight, bias), reference(x, core, weight, bias)
    torch.testing.assert_close(value, expected)
    grad = torch.randn_like(expected)
    ours = torch.autograd.grad(value, leaves, grad)
    for got, wanted in zip(ours, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("rows", [3, 40], ids=["rotating x", "folding"])
@pytest.mark.parametrize("order", [1, 2, 5])
def test_the_gradient_is_exact_for_a_series_that_is_no_rotation(order, rows):
    """``R`` itself in place of ``R⁻ᵀ`` would be wrong in the first digits here."""
    weight = random_packed(24, 16)
    assert folds_packed(rows, 24, 8, CPU) is (rows == 40)
    theta = 0.3 * torch.randn(2, 28, dtype=torch.float64)
    core = ops.cayley(theta, 8, order).requires_grad_()
    x = torch.randn(rows, 16, dtype=torch.float64)
    assert (core + core.mT + core @ core.mT).norm() > 1e-3
    (got,) = torch.autograd.grad(ops.rotated_linear(x, core, weight).sin().sum(), core)
    (wanted,) = torch.autograd.grad(reference(x, core, weight, None).sin().sum(), core)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_a_gpu_turns_no_weight_by_blocks_whose_grams_it_cannot_divide_at_once():
    gpu = torch.device("cuda")
    assert folds_packed(6, 96, 64, gpu)  # of fewer rows than a CPU would
    assert not folds_packed(5, 96, 64, gpu)
    assert not folds_packed(600, 24, 128, gpu)
    assert folds_packed(600, 24, 128, CPU)


@pytest.mark.parametrize("rows", [2, 9], ids=["rotating x", "folding"])
def test_gradcheck_and_gradgradcheck(rows):
    weight = random_packed(5, 6)
    x = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    core = (0.2 * torch.randn(2, 3, 3, dtype=torch.float64)).requires_grad_()
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def run(x, core, bias):
        return ops.rotated_linear(x, core, weight, bias)

    assert torch.autograd.gradcheck(run, (x, core, bias))
    assert torch.autograd.gradgradcheck(run, (x, core, bias))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rows", [3, 40], ids=["rotating x", "folding"])
def test_of_the_factors_of_a_product_the_gradients_are_those_of_x(rows, order):
    weight, row = random_packed(24, 16), torch.rand(rows, 1, dtype=torch.float64)
    up, column = torch.randn(rows, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    core = 0.2 * torch.randn(2, 8, 8, dtype=torch.float64)
    grad = torch.randn(rows, 24, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (grad, up, row, column, core)]

    def found(factors: list[Tensor]) -> tuple[Tensor, ...]:
        grads = ops.rotated_linear_grad(grad, factors, core, True, True, weight)
        if order == 1:
            return grads
        return torch.autograd.grad(sum(each.sin().sum() for each in grads), leaves)

    for got, expected in zip(found([up, row, column]), found([up * row * column]), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, double):
    weight = random_packed(8, 12, double=double)
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    core = (0.2 * torch.randn(3, 4, 4)).requires_grad_()
    bias = torch.randn(8, dtype=dtype)
    torch.library.opcheck(OP, (x, core, bias, *weight))
    grad = torch.randn(2, 5, 8, dtype=dtype)
    for needs in itertools.product((True, False), repeat=2):
        for factors in ([x.detach()], [x.detach(), torch.randn(12, dtype=dtype)]):
            torch.library.opcheck(GRAD, (grad, factors, core.detach(), *needs, *weight))


@pytest.mark.parametrize("frozen", ["x", "core"])
@pytest.mark.parametrize("rows", [3, 40])
def test_only_what_is_wanted_is_computed(rows, frozen):
    x, core = torch.randn(rows, 16), 0.2 * torch.randn(2, 8, 8)
    wanted = core if frozen == "x" else x
    wanted.requires_grad_()
    ops.rotated_linear(x, core, random_packed(24, 16)).sum().backward()
    assert (x.grad is None) is (frozen == "x")
    assert (core.grad is None) is (frozen == "core")


@pytest.mark.parametrize("rows", [3, 40])
def test_keeps_x_the_core_and_the_bytes(rows):
    weight = random_packed(24, 16, double=True)
    x, core = torch.randn(rows, 16, requires_grad=True), 0.2 * torch.randn(2, 8, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.rotated_linear(x, core.requires_grad_(), weight)
    held = {t.data_ptr() for t in (x, core, *weight) if isinstance(t, Tensor)}
    assert {t.data_ptr() for t in kept} == held
    assert len(kept) == len(held)


def test_compiled_without_a_graph_break(fresh_compiler):
    weight = random_packed(24, 16)
    x, core = torch.randn(40, 16), (0.2 * torch.randn(2, 8, 8)).requires_grad_()

    def step(x, core):
        return ops.rotated_linear(x, core, weight).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x, core), core)
    torch.testing.assert_close(got, torch.autograd.grad(step(x, core), core)[0])


def test_under_autocast_it_computes_as_given():
    weight, x = random_packed(24, 16), torch.randn(40, 16)
    core = (0.2 * torch.randn(2, 8, 8)).requires_grad_()
    expected = ops.rotated_linear(x, core, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.rotated_linear(x, core, weight), expected)


@pytest.mark.parametrize("rows", [3, 40])
def test_without_a_rotation_it_is_the_plain_matmul(rows):
    weight, x = random_packed(24, 16), torch.randn(rows, 16)
    expected = F.linear(x, packed.dequantised(weight, x.dtype))
    assert torch.equal(ops.rotated_linear(x, torch.zeros(2, 8, 8), weight), expected)


@pytest.mark.parametrize(("width", "n"), [(12, 2), (16, 3)])
def test_misfits_are_refused(width, n):
    with pytest.raises(RuntimeError, match="do not fit"):
        ops.rotated_linear(torch.randn(3, width), torch.zeros(n, 8, 8), random_packed(24, 16))


# --- layers that read one tensor ---


@pytest.mark.parametrize("b", [(8, 8, 8), (4, 8, 16)], ids=["blocks alike", "of any width"])
@pytest.mark.parametrize("wanted", ["all", "x", "cores", "one core"])
def test_deferred_they_are_each_layer_by_itself(wanted, b):
    x = torch.randn(3, 40, 16, dtype=torch.float64, requires_grad=wanted in ("all", "x"))
    cores = [0.2 * torch.randn(16 // wide, wide, wide, dtype=torch.float64) for wide in b]
    for core in cores[: 1 if wanted == "one core" else 0 if wanted == "x" else 3]:
        core.requires_grad_()
    weights = [random_packed(out, 16) for out in (24, 8, 7)]
    bias = torch.randn(24, dtype=torch.float64, requires_grad=True)
    biases = [bias, None, None]

    def grads(outs: list[Tensor]) -> list[Tensor]:
        total = sum((out * torch.arange(out.shape[-1])).sin().sum() for out in outs)
        leaves = [leaf for leaf in (x, bias, *cores) if leaf.requires_grad]
        return [*outs, *torch.autograd.grad(total, leaves)]

    turned = zip(ops.defer(x, cores), cores, weights, biases, strict=True)
    got = grads([ops.deferred_linear(y, c.detach(), w, bias) for y, c, w, bias in turned])
    each = zip(cores, weights, biases, strict=True)
    expected = grads([ops.rotated_linear(x, c, w, bias) for c, w, bias in each])
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_deferring_copies_nothing():
    x, core = torch.randn(40, 16), (0.2 * torch.randn(2, 8, 8)).requires_grad_()
    (deferred,) = ops.defer(x, [core])
    assert deferred.data_ptr() == x.data_ptr()
    assert deferred.requires_grad


# --- the weight itself ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantised_bit_for_bit_as_bitsandbytes_does(quant_type, block_size, double, dtype):
    weight = torch.randn(48, 256)
    data, state = bnb.functional.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double, quant_type=quant_type
    )
    state.dtype = dtype
    expected = bnb.functional.dequantize_4bit(data, state)
    ours = packed.dequantised(quantised(weight, quant_type, block_size, double), dtype)
    assert torch.equal(ours, expected)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([2, 4, 6, 32]), st.booleans())
def test_blocks_run_over_the_rows_laid_end_to_end(out, width, block_size, double):
    weight = random_packed(out, width, "nf4", block_size, double)
    number = [half for byte in weight.data.flatten().tolist() for half in divmod(byte, 16)]
    scale = packed.scales(weight).tolist()
    expected = [weight.code[k] * scale[j // block_size] for j, k in enumerate(number)]
    expected = torch.tensor(expected[: out * width]).view(out, width)
    assert torch.equal(packed.dequantised(weight, torch.float32), expected)
