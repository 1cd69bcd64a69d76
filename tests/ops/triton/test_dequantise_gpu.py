"""4-bit weights on a CUDA device, at real sizes, beside bitsandbytes' own kernels and float64."""

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F

from oftfx import ops
from oftfx.ops import packed
from oftfx.ops.rotated_linear import dequantised, folded
from oftfx.sites.bitsandbytes import packed_of
from tests.packed import random_packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = "cuda:0"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# W and the core are rounded, and then the result: three times half a unit, which add up as noise.
ROUNDING = {dtype: 1.5 * torch.finfo(dtype).eps for dtype in DTYPES}
ROUNDING[torch.float32] *= 8  # a product of float32 is three of tf32, whose digits are cut


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def random_core(width: int, b: int) -> torch.Tensor:
    return 0.3 / b**0.5 * torch.randn(width // b, b, b, device=CUDA)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_weight_has_bitsandbytes_bits(quant_type, double, dtype):
    for shape in ((3584, 3584), (99, 160)):
        weight = torch.randn(shape, device=CUDA, dtype=dtype)
        data, state = bnb.functional.quantize_4bit(
            weight, compress_statistics=double, quant_type=quant_type
        )
        expected, ours = bnb.functional.dequantize_4bit(data, state), packed_of(data, state)
        assert torch.equal(dequantised(ours, dtype), expected)
        assert torch.equal(packed.dequantised(ours, dtype), expected)
        no_turn = torch.zeros(shape[1] // 32, 32, 32, device=CUDA)
        assert torch.equal(folded(ours, no_turn, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [16, 32, 64, 128])
def test_it_folds_as_float64_does(b, dtype):
    for out, width in ((3584, 3584), (1001, 640), (3, 384)):
        weight = random_packed(out, width, device=CUDA)
        core = random_core(width, b)
        exact = ops.rotate(packed.dequantised(weight, torch.float64), core.double().mT)
        assert error(folded(weight, core, dtype), exact) < ROUNDING[dtype]
        assert error(folded(weight, core.mT.contiguous().mT, dtype), exact) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [16, 32, 64, 128, 8, 256])
@pytest.mark.parametrize("rows", [100, 2048], ids=["rotating x", "folding"])
def test_value_and_gradients_are_those_of_float64(rows, b, dtype):
    weight = random_packed(768, 512, device=CUDA)
    leaves = (torch.randn(rows, 512, device=CUDA, dtype=dtype), random_core(512, b))
    x, core = (leaf.requires_grad_() for leaf in leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = F.linear(ops.rotate(*wide), packed.dequantised(weight, torch.float64))
    value = ops.rotated_linear(x, core, weight)
    grad = torch.randn(rows, 768, device=CUDA, dtype=dtype)
    got = torch.autograd.grad(value, (x, core), grad)
    expected = torch.autograd.grad(exact, wide, grad.double())
    # Two operands of the product are rounded, and its result; a rotation of x rounds once more.
    for one, other in zip((value, *got), (exact, *expected), strict=True):
        assert error(one.detach(), other.detach()) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [16, 32, 64, 128])
@pytest.mark.parametrize("rows", [100, 2048], ids=["rotating x", "folding"])
def test_gradients_of_a_gated_product_are_those_of_x(rows, b, dtype):
    """From its factors, which are all that is kept of it."""
    weight, core = random_packed(768, 512, device=CUDA), random_core(512, b)
    gate, up = torch.randn(2, rows, 512, device=CUDA).to(dtype).unbind()
    leaves = [leaf.requires_grad_() for leaf in (gate, up, core)]
    grad = torch.randn(rows, 768, device=CUDA).to(dtype)

    def gradients(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(ops.rotated_linear(x, core, weight), leaves, grad)

    got = gradients(F.silu(gate) * up)
    expected = gradients((F.silu(gate) * up).clone())  # no product, so kept itself
    for one, other in zip(got, expected, strict=True):
        assert error(one, other.double()) < 5e-6


@pytest.mark.parametrize("b", [16, 32, 64])
def test_gram_matrices_are_divided_in_float32s_digits(b):
    divide = pytest.importorskip("oftfx.ops.triton.divide")
    gram, core = torch.randn(100, b, b, device=CUDA), random_core(100 * b, b)
    turn = torch.eye(b, device=CUDA, dtype=torch.float64) + core.double()
    exact = gram.double() @ torch.linalg.inv(turn).mT
    assert error(divide.divided(gram, core), exact) < 16 * torch.finfo(torch.float32).eps


def test_opcheck():
    weight = random_packed(96, 64, double=True, device=CUDA)
    core = random_core(64, 32).requires_grad_()
    for rows in (5, 200):
        x = torch.randn(rows, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        torch.library.opcheck(torch.ops.oftfx.rotated_linear.default, (x, core, None, *weight))


def test_the_same_input_gives_the_same_bits():
    weight, core = random_packed(512, 512, device=CUDA), random_core(512, 32)
    x = torch.randn(2048, 512, device=CUDA, dtype=torch.bfloat16)
    grad = torch.randn(2048, 512, device=CUDA, dtype=torch.bfloat16)
    first = ops.rotated_linear_grad(grad, [x], core, True, True, weight)
    for _ in range(3):
        again = ops.rotated_linear_grad(grad, [x], core, True, True, weight)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_offsets_beyond_32_bits():
    """A weight of more than 2³¹ numbers, whose last rows are looked at."""
    out, width = 2**31 // 4096 + 64, 4096
    weight = random_packed(out, width, device=CUDA)
    last = weight._replace(
        data=weight.data[-64 * width // 2 :],
        absmax=weight.absmax[-64 * width // 64 :],
        shape=(64, width),
    )
    core = random_core(width, 32)
    assert torch.equal(
        folded(weight, core, torch.bfloat16)[-64:], folded(last, core, torch.bfloat16)
    )
