"""The kernels of a gated product and its rotation beside the float64 reference.

bf16 products are right on a device only: the interpreter multiplies their bit patterns.
"""

import pytest
import torch

from oftfx import ops
from oftfx.ops.glu_rotate import ACTIVATIONS

kernel = pytest.importorskip("oftfx.ops.triton.glu_rotate")
tiles = pytest.importorskip("oftfx.ops.triton.tiles")

# (rows, n, b): one and many tiles, packs that are full, padded, cut off by n, and split in parts
SIZES = [(3, 7, 2), (65, 33, 4), (17, 5, 7), (70, 5, 32), (33, 1, 33), (70, 2, 64), (20, 1, 128)]
# Rounded after the activation, after the product and after the rotation.
ROUNDING = {torch.float16: 5e-4, torch.float32: 1e-6}


def case(rows: int, n: int, b: int, dtype: torch.dtype, device: torch.device, gated: bool = True):
    grad, gate, up = torch.randn(3, rows, n * b, device=device).to(dtype).unbind()
    # As the reference computes: with the core in gate's dtype.
    core = (0.3 / b**0.5 * torch.randn(n, b, b, device=device)).to(dtype).float()
    return grad, gate, up if gated else None, core


def doubles(*tensors):
    return [t if t is None else t.double() for t in tensors]


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def assert_right(case, activation):
    """In value and gradients; the latter are rounded once or, through the product, twice."""
    _, gate, up, core = case
    bound = ROUNDING[gate.dtype]
    out = kernel.glu_rotate(gate, up, core, activation)
    assert out.dtype == gate.dtype
    assert out.is_contiguous()
    assert error(out, ops.glu_rotate(*doubles(gate, up, core), activation)) < bound
    grads = kernel.glu_rotate_grad(*case, activation, True, True)
    exact = ops.glu_rotate_grad(*doubles(*case), activation, True, True)
    for value, reference in zip(grads[:2], exact[:2], strict=True):
        assert value.dtype == gate.dtype
        assert value.shape == reference.shape
        assert value.numel() == 0 or error(value, reference) < bound
    assert grads[2].dtype == torch.float32
    assert error(grads[2], exact[2]) < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "n", "b"), SIZES)
def test_values_and_gradients_are_the_references(rows, n, b, dtype, device):
    assert_right(case(rows, n, b, dtype, device), "silu")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_gated_or_not(activation, dtype, gated, device):
    assert_right(case(70, 3, 16, dtype, device, gated), activation)


def test_arguments_of_any_size_give_no_nonsense(device):
    """The largest magnitudes, zeros and what lies below the smallest normal number."""
    edges = [0.0, -0.0, 1e-8, -1e-8, 20.0, -20.0, 300.0, -300.0, 6e4, -6e4]
    gate = torch.tensor(edges + [1.0] * 6, device=device).half().expand(2, 16)
    zero = torch.zeros(1, 16, 16, device=device)
    ones = torch.ones_like(gate)
    for activation in set(ACTIVATIONS) - {"relu2"}:  # whose values of these are infinite
        expected = ops.glu_rotate(*doubles(gate, ones, zero), activation)
        out = kernel.glu_rotate(gate, ones, zero, activation)
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-7)
        slopes = ops.glu_rotate_grad(*doubles(ones, gate, ones, zero), activation, True, False)
        found = kernel.glu_rotate_grad(ones, gate, ones, zero, activation, True, False)
        torch.testing.assert_close(found[0].double(), slopes[0], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("need_x", "need_core"), [(True, False), (False, True), (False, False)])
def test_half_the_gradient_is_the_same_half(need_x, need_core, device):
    given = case(70, 5, 8, torch.float16, device)
    whole = kernel.glu_rotate_grad(*given, "silu", True, True)
    half = kernel.glu_rotate_grad(*given, "silu", need_x, need_core)
    for value, expected, needed in zip(half, whole, (need_x, need_x, need_core), strict=True):
        assert (value.numel() > 0) is needed
        assert not needed or torch.equal(value, expected)


@pytest.mark.parametrize("layout", ["halves", "transposed", "expanded", "4-D", "1-D"])
def test_operands_may_have_any_strides(layout, device):
    b, width = 12, 24
    gate, up = {
        "halves": lambda: torch.randn(6, 2 * width).chunk(2, dim=-1),
        "transposed": lambda: (torch.randn(width, 6).T, torch.randn(6, width)),
        "expanded": lambda: (torch.randn(6, width), torch.randn(1, width).expand(6, width)),
        "4-D": lambda: torch.randn(2, 3, 2, 4, width).transpose(1, 3).unbind(),
        "1-D": lambda: torch.randn(2, width).unbind(),
    }[layout]()
    gate, up = gate.half().to(device), up.half().to(device)
    core = (0.1 * torch.randn(b, b, 2, device=device)).half().float().permute(2, 0, 1)
    grad = torch.randn(width, device=device).half().expand(gate.shape)
    assert_right((grad, gate, up, core), "silu")


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_nothing_gives_nothing_and_zero_gradients(shape, device):
    x = torch.zeros(shape, device=device).half()
    core = torch.randn(shape[-1] // 4, 4, 4, device=device)
    assert kernel.glu_rotate(x, x, core, "silu").shape == shape
    *grads, grad_core = kernel.glu_rotate_grad(x, x, x, core, "silu", True, True)
    assert [grad.shape for grad in grads] == [shape, shape]
    assert grad_core.shape == core.shape
    assert not grad_core.any()


def test_many_runs_are_added_the_same_way_every_time(device, monkeypatch):
    monkeypatch.setattr(tiles, "processors", lambda device: 20)
    kernel._work.cache_clear()
    given = case(64 * 9, 1, 16, torch.float16, device)
    first, again = (kernel.glu_rotate_grad(*given, "silu", True, True)[2] for _ in range(2))
    kernel._work.cache_clear()
    exact = ops.glu_rotate_grad(*doubles(*given), "silu", True, True)[2]
    assert torch.equal(first, again)
    assert error(first, exact) < ROUNDING[torch.float16]


def test_serves_what_it_says():
    def fits(dtype=torch.bfloat16, b=32, n=1):
        return kernel.fits(torch.zeros(b, dtype=dtype), torch.zeros(n, b, b), "silu")

    assert all(fits(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32))
    assert not fits(torch.float64)
    assert all(fits(b=b) for b in (2, 16, 32, 64, 128))
    assert not fits(b=129)
