"""`oftfx::rms_rotate_grad`: what autograd gives of an RMSNorm and its rotations."""

import pytest
import torch

from oftfx import ops

RMS_GRAD = torch.ops.oftfx.rms_rotate_grad.default


def case(count=2, shape=(5, 12), b=4, weighted=True, dtype=torch.float64):
    cores = [0.2 * torch.randn(shape[-1] // b, b, b, dtype=dtype) for _ in range(count)]
    x, *grads = (torch.randn(shape, dtype=dtype) for _ in range(count + 1))
    weight = 1 + 0.3 * torch.randn(shape[-1], dtype=dtype) if weighted else None
    return x, weight, cores, grads


def rstd_of(x):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)


def apart(x, weight, cores):
    """The norm as models write it, and rotations written as PyTorch's matmuls."""
    y = x * rstd_of(x)
    y = y if weight is None else weight * y
    return [y + y @ torch.block_diag(*core) for core in cores]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 8), (12,), (0, 8)])
@pytest.mark.parametrize("count", [1, 3])
def test_is_what_autograd_gives(shape, weighted, count):
    x, weight, cores, grads = case(count, shape, weighted=weighted)
    flat = [t.requires_grad_() for t in (x, *cores)]
    expected_x, *expected = torch.autograd.grad(apart(x, weight, cores), flat, grads)
    grad_x, grad_cores = ops.rms_rotate_grad(grads, x, rstd_of(x), weight, cores, True)
    torch.testing.assert_close(grad_x, expected_x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grad_cores, expected, rtol=1e-11, atol=1e-11)


def test_can_itself_be_differentiated():
    x, weight, cores, grads = case(1, (3, 8))
    rstd = rstd_of(x)

    def run(grad, x, core):
        grad_x, grad_cores = ops.rms_rotate_grad([grad], x, rstd, weight, [core], True)
        return grad_x, *grad_cores

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (*grads, x, *cores)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [True, False])
def test_opcheck(dtype, wanted):
    x, weight, cores, grads = case(2, (4, 32), 16, dtype=dtype)
    given = grads, x, rstd_of(x), weight, [core.float() for core in cores], wanted
    torch.library.opcheck(RMS_GRAD, given)


def test_cores_that_want_none_get_none():
    x, weight, cores, grads = case()
    _, grad_cores = ops.rms_rotate_grad(grads, x, rstd_of(x), weight, cores, False)
    assert [grad.numel() for grad in grad_cores] == [0, 0]


def test_keeps_its_digits_under_autocast():
    x, weight, cores, grads = case(1, (4, 32), 16, dtype=torch.float32)
    given = grads, x, rstd_of(x), weight, cores, True
    plain = ops.rms_rotate_grad(*given)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ops.rms_rotate_grad(*given)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
