"""The gradients of rotations of an RMSNorm, beside the float64 reference.

bf16 products are right on a device only: the interpreter multiplies their bit patterns.
"""

import pytest
import torch

from oftfx import ops

kernel = pytest.importorskip("oftfx.ops.triton.rms_rotate")

# (rows, n, b): one and many tiles and packs; widths that are no power of two
SIZES = [(3, 7, 2), (65, 33, 4), (200, 5, 32), (33, 1, 33), (70, 2, 64)]
HALF = torch.float16


def case(count, rows, n, b, device, x_dtype=HALF, weighted=True):
    x, *grads = torch.randn(count + 1, rows, n * b, device=device).unbind()
    x = x.to(x_dtype)
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    weight = (1 + 0.3 * torch.randn(n * b, device=device)).to(HALF) if weighted else None
    # As the reference computes: with the cores in the rotation's dtype.
    cores = (0.3 / b**0.5 * torch.randn(count, n, b, b, device=device)).to(HALF).float()
    return [grad.to(HALF) for grad in grads], x, rstd, weight, list(cores.unbind())


def exact(grads, x, rstd, weight, cores):
    wide = None if weight is None else weight.double()
    of = [grad.double() for grad in grads], x.double(), rstd.double(), wide
    return ops.rms_rotate_grad(*of, [core.double() for core in cores], True)


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("rows", "n", "b"), SIZES)
def test_is_the_reference(count, rows, n, b, device):
    given = case(count, rows, n, b, device)
    grad_x, grad_cores = kernel.rms_rotate_grad(*given, True)
    exact_x, exact_cores = exact(*given)
    assert grad_x.dtype == HALF
    assert error(grad_x, exact_x) < 5e-4  # rounded before the rows' share goes off, and after
    for value, wanted in zip(grad_cores, exact_cores, strict=True):
        assert error(value, wanted) < 3e-4


def test_a_problem_of_the_same_sizes_in_another_dtype_is_another(device):
    for dtype, bound in ((HALF, 5e-4), (torch.float32, 2e-6), (HALF, 5e-4)):
        given = case(2, 48, 4, 16, device, dtype)
        for _ in range(2):  # the second launch takes the code of the first
            grad_x, _ = kernel.rms_rotate_grad(*given, True)
            assert grad_x.dtype == dtype
            assert error(grad_x, exact(*given)[0]) < bound


@pytest.mark.parametrize("weighted", [True, False])
def test_of_a_wider_residual(weighted, device):
    given = case(2, 70, 5, 16, device, torch.float32, weighted)
    grad_x, grad_cores = kernel.rms_rotate_grad(*given, True)
    exact_x, exact_cores = exact(*given)
    assert grad_x.dtype == torch.float32
    assert error(grad_x, exact_x) < 2e-6
    for value, wanted in zip(grad_cores, exact_cores, strict=True):
        assert error(value, wanted) < 3e-4


def test_of_rows_that_no_program_holds_at_once(device):
    given = case(1, 5, 2 * kernel.MOST // 32 + 3, 32, device)
    assert error(kernel.rms_rotate_grad(*given, True)[0], exact(*given)[0]) < 5e-4


def test_of_rows_that_lie_apart(device):
    grads, x, rstd, weight, cores = case(1, 40, 3, 16, device)
    apart = torch.empty(40, 100, dtype=HALF, device=device)[:, :48].copy_(x)
    for value, same in zip(
        kernel.rms_rotate_grad(grads, apart, rstd, weight, cores, True),
        kernel.rms_rotate_grad(grads, x, rstd, weight, cores, True),
        strict=True,
    ):
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value


def test_of_the_cores_only_where_they_are_wanted(device):
    given = case(2, 20, 3, 16, device)
    grad_x, grad_cores = kernel.rms_rotate_grad(*given, False)
    assert torch.equal(grad_x, kernel.rms_rotate_grad(*given, True)[0])
    assert all(not grad.numel() for grad in grad_cores)


def test_of_no_rows(device):
    grad_x, (grad_core,) = kernel.rms_rotate_grad(*case(1, 0, 3, 16, device), True)
    assert grad_x.shape == (0, 48)
    assert not grad_core.any()
