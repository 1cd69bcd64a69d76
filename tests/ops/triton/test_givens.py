"""The Givens kernels beside the float64 reference.

bf16 products are right on a device only: the interpreter multiplies their bit patterns.
"""

import pytest
import torch

from oftfx import ops

kernel = pytest.importorskip("oftfx.ops.triton.givens")

# (rows, width): a pair, one chunk and its padding, a level of heads, rows in several tiles and runs
SIZES = [(3, 2), (70, 16), (5, 17), (67, 100)]
ROUNDING = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4, torch.float32: 1e-6}


def operands(rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32):
    grad, x = torch.randn(2, rows, width, device=device).to(dtype).unbind()
    return grad, x, 0.3 * torch.randn(width - 1, 2, 2, device=device)


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_values_and_gradients_are_the_references(rows, width, transposed, device):
    grad, x, core = operands(rows, width, device)
    exact = ops.givens(x.double(), core.double(), transposed)
    assert error(kernel.givens(x, core, transposed), exact) < 1e-6
    wide = (grad.double(), x.double(), core.double())
    exacts = ops.givens_grad(*wide, True, True, transposed)
    grads = kernel.givens_grad(grad, x, core, True, True, transposed)
    assert all(error(*pair) < 2e-6 for pair in zip(grads, exacts, strict=True))


def test_low_precision_is_rounded_last(device):
    for dtype in (torch.float16, torch.bfloat16)[: 1 if device.type == "cpu" else 2]:
        grad, x, core = operands(9, 100, device, dtype)
        args = (grad, x, 0.1 * core)
        exact = ops.givens(x.double(), args[2].double())
        assert error(kernel.givens(x, args[2], False), exact) < ROUNDING[dtype]
        exact_x, exact_core = ops.givens_grad(*(t.double() for t in args), True, True)
        grad_x, grad_core = kernel.givens_grad(*args, True, True, False)
        assert (grad_x.dtype, grad_core.dtype) == (dtype, torch.float32)
        assert error(grad_x, exact_x) < ROUNDING[dtype]
        assert error(grad_core, exact_core) < ROUNDING[dtype]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_zero_core_is_the_identity_to_the_last_bit(dtype, transposed, device):
    info = torch.finfo(dtype)
    # Not the largest float32 itself: a device splits it in parts, and rounds one to infinity.
    edges = [0.0, info.max / 2, -info.max / 2, info.tiny, 1 / 3]
    x = torch.cat([torch.tensor(edges, dtype=dtype), torch.randn(135).to(dtype)]).view(2, 70)
    x, core = x.to(device), torch.zeros(69, 2, 2, device=device)
    assert torch.equal(kernel.givens(x, core, transposed), x)


@pytest.mark.parametrize("transposed", [False, True])
def test_half_the_gradient(transposed, device):
    grad, x, core = operands(4, 70, device)
    both = kernel.givens_grad(grad, x, core, True, True, transposed)
    only_x, no_core = kernel.givens_grad(grad, x, core, True, False, transposed)
    no_x, only_core = kernel.givens_grad(grad, x, core, False, True, transposed)
    assert torch.equal(only_x, both[0])
    assert torch.equal(only_core, both[1])
    assert no_x.numel() == no_core.numel() == 0


def test_operands_may_have_any_strides(device):
    grad, x, core = operands(6, 70, device)
    x, grad = x.T.contiguous().T, torch.cat((grad, grad), 1)[:, 35:105]
    core = core.mT
    assert not any(tensor.is_contiguous() for tensor in (x, grad, core))
    exact = ops.givens(x.double(), core.double())
    assert error(kernel.givens(x, core, False), exact) < 1e-6
    exacts = ops.givens_grad(grad.double(), x.double(), core.double(), True, True)
    grads = kernel.givens_grad(grad, x, core, True, True, False)
    assert all(error(*pair) < 2e-6 for pair in zip(grads, exacts, strict=True))


def test_no_rows_give_no_rows(device):
    grad, x, core = operands(0, 70, device)
    assert kernel.givens(x, core, False).shape == (0, 70)
    grad_x, grad_core = kernel.givens_grad(grad, x, core, True, True, False)
    assert grad_x.shape == (0, 70)
    assert not grad_core.any()


def test_many_runs_give_the_bits_of_any_other_time(device, monkeypatch):
    monkeypatch.setattr(kernel, "processors", lambda device: 2)
    grad, x, core = operands(130, 17, device)
    first = kernel.givens_grad(grad, x, core, True, True, False)
    again = kernel.givens_grad(grad, x, core, True, True, False)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    exacts = ops.givens_grad(grad.double(), x.double(), core.double(), True, True)
    assert all(error(*pair) < 2e-6 for pair in zip(first, exacts, strict=True))


def test_serves_what_triton_can_multiply():
    core = torch.zeros(7, 2, 2)
    assert kernel.fits(torch.zeros(3, 8), core)
    assert not kernel.fits(torch.zeros(3, 8, dtype=torch.float64), core)
    assert not kernel.fits(torch.zeros(3, 1), torch.zeros(0, 2, 2))
