"""Gradients of a rotated product, which the kernel makes tile by tile: its bits, and theirs.

bf16 is right on a device only: the interpreter cuts its digits and multiplies its bit patterns.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oftfx import ops
from oftfx.ops.packed import Packed
from tests.packed import random_packed

kernel = pytest.importorskip("oftfx.ops.triton.rotate_product")

# (rows, n, b): one and many tiles, packs that are full, padded, cut off by n, and split in parts
SIZES = [(1, 1, 2), (65, 33, 4), (17, 5, 7), (200, 5, 32), (33, 1, 33), (70, 2, 64), (66, 1, 128)]
HALF, SINGLE = torch.float16, torch.float32
ROUNDING = {HALF: 3e-4, SINGLE: 1e-6}
SERVED = [
    (*size, dtype) for size in SIZES for dtype in ROUNDING if size[-1] * dtype.itemsize <= 256
]


def case(rows: int, n: int, b: int, dtype: torch.dtype, device: torch.device):
    grad, *factors = torch.randn(3, rows, n * b, device=device).to(dtype).unbind()
    # As the reference computes: with the core in x's dtype.
    core = (0.3 / b**0.5 * torch.randn(n, b, b, device=device)).to(dtype).float()
    return grad, factors, core


def served(grad: Tensor, factors: list[Tensor], core: Tensor, need_x=True, need_core=True):
    assert kernel.fits([grad], factors, [core])
    grad_x, (grad_core,) = kernel.rotate_product_grad([grad], factors, [core], need_x, need_core)
    return grad_x, grad_core


def made(grad: Tensor, factors: list[Tensor], core: Tensor):
    """What the rotation's own kernel gives for the product that PyTorch made."""
    return kernel.rotate.rotate_grad(grad, factors[0] * factors[1], core, True, True)


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("rows", "n", "b", "dtype"), SERVED)
def test_gradients_are_those_of_the_product_that_pytorch_makes(rows, n, b, dtype, device):
    grad, factors, core = case(rows, n, b, dtype, device)
    x = factors[0] * factors[1]
    exact_x, exact_core = ops.rotate_grad(grad.double(), x.double(), core.double(), True, True)
    for order in (factors, factors[::-1]):
        grad_x, grad_core = served(grad, order, core)
        assert (grad_x.dtype, grad_core.dtype) == (dtype, core.dtype)
        assert torch.equal(grad_x, made(grad, order, core)[0])
        assert error(grad_x, exact_x) < ROUNDING[dtype]
        # Far below the rounding of a product of 16 bits, which therefore happened as in PyTorch.
        assert error(grad_core, exact_core) < 1e-6


@pytest.mark.parametrize("b", [2, 7, 32, 33, 64])
def test_the_product_has_pytorchs_bits(b, device):
    """With one row and gradients of one, a Gram matrix is nothing but the product's numbers."""
    for dtype in (HALF, SINGLE, torch.bfloat16)[: 2 if device.type == "cpu" else 3]:
        _, (a, by), core = case(1, 480 // b, b, dtype, device)
        a = a * torch.logspace(-3, 3, a.shape[-1], device=device).to(dtype)
        given = torch.ones_like(a), [a, by], core
        assert torch.equal(served(*given)[1], made(*given)[1])


@pytest.mark.parametrize(("need_x", "need_core"), [(True, False), (False, True), (False, False)])
def test_half_the_gradient_is_the_same_half(need_x, need_core, device):
    given = case(70, 5, 8, SINGLE, device)
    whole_x, whole_core = served(*given)
    grad_x, grad_core = served(*given, need_x, need_core)
    assert (grad_x.numel() > 0, grad_core.numel() > 0) == (need_x, need_core)
    if need_x:
        assert torch.equal(grad_x, whole_x)
    if need_core:
        torch.testing.assert_close(grad_core, whole_core)


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "expanded", "4-D", "1-D"])
def test_factors_may_have_any_strides(layout, device):
    b, width = 12, 24
    a = {
        "rows apart": lambda: torch.randn(6, width + 5)[:, 2:-3],
        "transposed": lambda: torch.randn(width, 6).T,
        "expanded": lambda: torch.randn(1, width).expand(6, width),
        "4-D": lambda: torch.randn(3, 2, 4, width).transpose(0, 2),
        "1-D": lambda: torch.randn(width),
    }[layout]().to(device)
    by = torch.randn(*a.shape[:-1], width + 3, device=device)[..., 3:]
    core = (0.1 * torch.randn(b, b, 2, device=device)).permute(2, 0, 1)
    grad = torch.randn(width, device=device).expand(a.shape)
    exacts = ops.rotate_grad(grad.double(), (a * by).double(), core.double(), True, True)
    for factors in ([a, by], [by, a]):
        ours = served(grad, factors, core)
        assert all(error(*pair) < 1e-6 for pair in zip(ours, exacts, strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_give_no_rows_and_a_zero_gradient(shape, device):
    x, core = torch.zeros(shape, device=device), torch.randn(2, 4, 4, device=device)
    grad_x, grad_core = served(x, [x, x], core)
    assert grad_x.shape == shape
    assert torch.equal(grad_core, torch.zeros_like(core))


def test_serves_what_it_says():
    def fits(count=1, dtype=SINGLE, b=8, factors=2, shape=None, other=None):
        x = torch.zeros(3, b, dtype=dtype)
        more = torch.zeros(shape or x.shape, dtype=other or dtype)
        given = [x, more] if factors == 2 else [x] * factors
        return kernel.fits([x] * count, given, [torch.zeros(1, b, b)] * count)

    assert all(fits(dtype=dtype) for dtype in (torch.bfloat16, HALF, SINGLE))
    assert not fits(dtype=torch.float64)
    assert not fits(count=2)
    assert not any(fits(factors=count) for count in (1, 3))
    assert not any(fits(shape=shape) for shape in ((8,), (3, 1)))
    assert not fits(other=HALF)
    assert fits(b=128, dtype=HALF)
    assert not fits(b=129, dtype=HALF)
    assert fits(b=64)
    assert not fits(b=65)


def layer(x: Tensor, core: Tensor, weight: Packed) -> Tensor:
    """As a float layer does it."""
    return F.linear(ops.rotate(x, core), torch.ones(24, 16, dtype=x.dtype, device=x.device))


@pytest.mark.parametrize("run", [layer, ops.rotated_linear], ids=["float", "nf4"])
@pytest.mark.parametrize("rows", [3, 40], ids=["rotating x", "folding"])
def test_a_gated_mlp_keeps_no_product_and_makes_none(rows, run, device, monkeypatch):
    weight = random_packed(24, 16, device=device)
    core = (0.2 * torch.randn(2, 8, 8, device=device)).requires_grad_()
    leaves = list(torch.randn(2, rows, 16, device=device).to(HALF).unbind())
    gate, up = (leaf.requires_grad_() for leaf in leaves)

    def multiplied(family) -> tuple[int, tuple[Tensor, ...]]:
        """Products of matrices like x in the backward, and the gradients."""
        monkeypatch.setattr("oftfx.ops.rotate_product.kernels", lambda *_: family)
        x = F.silu(gate) * up
        y = run(x, core, weight)
        node = y.grad_fn if run is ops.rotated_linear else y.grad_fn.next_functions[0][0]
        assert x.data_ptr() not in [kept.data_ptr() for kept in node.saved_tensors]
        with torch.autograd.profiler.profile(record_shapes=True) as seen:
            grads = torch.autograd.grad(y.float().square().sum(), (gate, up, core))
        products = [e for e in seen.function_events if e.name == "aten::mul"]
        return sum([rows, 16] in e.input_shapes for e in products), grads

    count, grads = multiplied(kernel)
    again, expected = multiplied(None)
    assert (count, again) == (2, 3)  # the model's own, of the gradient with each factor
    for value, reference in zip(grads, expected, strict=True):
        assert error(value, reference.double()) < 2e-3
