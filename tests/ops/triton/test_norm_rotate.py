"""The kernels of a norm with its rotations beside the float64 reference.

bf16 products are right on a device only: the interpreter multiplies their bit patterns.
"""

import pytest
import torch

from oftfx import ops
from oftfx.ops.norm_rotate import Norm

kernel = pytest.importorskip("oftfx.ops.triton.norm_rotate")
tiles = pytest.importorskip("oftfx.ops.triton.tiles")

# (rows, n, b): one and many tiles; packs that are full, padded and cut off by n
SIZES = [(3, 7, 2), (65, 33, 4), (17, 5, 7), (200, 5, 32), (64, 2, 32), (33, 1, 33), (70, 2, 64)]
HALF = torch.float16
ROUNDING = 3e-4
# The norm itself is rounded to 16 bits, and what follows does the same to that.
ROUNDED_TWICE = 5e-4


def case(count, rows, n, b, device, kind="layer", x_dtype=HALF):
    """Gradients, and the op's operands but for the dtype; statistics of no norm in particular."""
    x, *grads = torch.randn(count + 1, rows, n * b, device=device).unbind()
    mean = 0.5 * torch.randn(rows, 1, device=device) if kind == "layer" else None
    rstd = 0.5 + torch.rand(rows, 1, device=device)
    weight = None if kind == "bare" else (1 + 0.3 * torch.randn(n * b, device=device)).to(x_dtype)
    bias = torch.randn(n * b, device=device).to(x_dtype) if kind == "layer" else None
    # As the reference computes: with the cores in the rotation's dtype.
    cores = (0.3 / b**0.5 * torch.randn(count, n, b, b, device=device)).to(HALF).float()
    given = (x.to(x_dtype), Norm(mean, rstd, weight, bias), list(cores.unbind()))
    return [grad.to(HALF) for grad in grads], given


def double(given):
    x, norm, cores = given
    wide = Norm(*(None if t is None else t.double() for t in norm))
    return x.double(), wide, [core.double() for core in cores]


def exact_grads(grads, given, need_affine=False):
    return ops.norm_rotate_grad(
        [grad.double() for grad in grads], *double(given), True, need_affine, True
    )


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("rows", "n", "b"), SIZES)
def test_is_the_reference(count, rows, n, b, device):
    grads, given = case(count, rows, n, b, device)
    outs = kernel.norm_rotate(*given, HALF)
    assert len(outs) == count
    for out, exact in zip(outs, ops.norm_rotate(*double(given), torch.float64), strict=True):
        assert out.dtype == HALF
        assert error(out, exact) < ROUNDED_TWICE
    grad_x, grad_mean, grad_rstd, grad_cores = kernel.norm_rotate_grad(grads, *given, True, True)
    exact_x, exact_mean, exact_rstd, _, _, exact_cores = exact_grads(grads, given)
    assert grad_x.dtype == HALF
    assert error(grad_x, exact_x) < ROUNDING
    assert error(grad_mean, exact_mean) < 5e-6  # summed in float32, of nothing that was rounded
    assert error(grad_rstd, exact_rstd) < 5e-6
    for value, exact in zip(grad_cores, exact_cores, strict=True):
        assert value.dtype == torch.float32
        assert error(value, exact) < ROUNDING


@pytest.mark.parametrize("kind", ["rms", "bare"])
@pytest.mark.parametrize("x_dtype", [HALF, torch.float32])
def test_norms_without_means_or_weights_and_wider_residuals(kind, x_dtype, device):
    grads, given = case(2, 70, 5, 16, device, kind, x_dtype)
    for out, exact in zip(
        kernel.norm_rotate(*given, HALF),
        ops.norm_rotate(*double(given), torch.float64),
        strict=True,
    ):
        assert error(out, exact) < ROUNDED_TWICE
    grad_x, grad_mean, grad_rstd, grad_cores = kernel.norm_rotate_grad(grads, *given, True, True)
    exact_x, _, exact_rstd, _, _, exact_cores = exact_grads(grads, given)
    assert (grad_x.dtype, grad_mean.numel()) == (x_dtype, 0)
    assert error(grad_x, exact_x) < (ROUNDING if x_dtype is HALF else 1e-6)
    assert error(grad_rstd, exact_rstd) < 5e-6
    for value, exact in zip(grad_cores, exact_cores, strict=True):
        assert error(value, exact) < ROUNDING


def test_zero_cores_leave_the_rounded_norm_to_the_last_bit(device):
    _, (x, norm, cores) = case(2, 65, 5, 32, device)
    zeros = [torch.zeros_like(core) for core in cores]
    exact = ((x.float() - norm.mean) * norm.rstd).double() * norm.weight + norm.bias
    for out in kernel.norm_rotate(x, norm, zeros, HALF):
        assert error(out, exact) < ROUNDING
        other = ops.norm_rotate(x, norm, zeros, HALF)[0]
        assert (out != other).float().mean() < 1e-3  # where a + b·c is one instruction


@pytest.mark.parametrize("readers", [2, 3])
def test_gradients_of_one_rotations_readers_are_turned_back_together(readers, device):
    grads, (x, norm, cores) = case(readers, 70, 5, 16, device)
    given = (x, norm, cores[:1])
    grad_x, grad_mean, grad_rstd, (grad_core,) = kernel.norm_rotate_grad(grads, *given, True, True)
    exact_x, exact_mean, exact_rstd, _, _, (exact_core,) = exact_grads(grads, given)
    assert error(grad_x, exact_x) < ROUNDING
    assert error(grad_mean, exact_mean) < 5e-6
    assert error(grad_rstd, exact_rstd) < 5e-6
    assert error(grad_core, exact_core) < ROUNDING


@pytest.mark.parametrize(("need_x", "need_cores"), [(True, False), (False, True), (False, False)])
def test_half_the_gradient_is_the_same_half(need_x, need_cores, device):
    grads, given = case(3, 70, 5, 8, device)
    *whole, whole_cores = kernel.norm_rotate_grad(grads, *given, True, True)
    *half, grad_cores = kernel.norm_rotate_grad(grads, *given, need_x, need_cores)
    for value, expected in zip(half, whole, strict=True):
        assert torch.equal(value, expected) if need_x else value.numel() == 0
    for value, expected in zip(grad_cores, whole_cores, strict=True):
        if need_cores:
            torch.testing.assert_close(value, expected)
        else:
            assert value.numel() == 0


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "4-D", "1-D"])
def test_operands_may_have_any_strides(layout, device):
    b, width = 12, 24
    x = {
        "rows apart": lambda: torch.randn(6, width + 5)[:, 2:-3],
        "transposed": lambda: torch.randn(width, 6).T,
        "4-D": lambda: torch.randn(3, 2, 4, width).transpose(0, 2),
        "1-D": lambda: torch.randn(width),
    }[layout]().to(device, HALF)
    rows = x.shape[:-1]
    mean = torch.randn(*rows, 2, device=device)[..., :1]
    rstd = torch.rand(1, device=device).expand(*rows, 1)
    weight, bias = torch.randn(width, 2, device=device).unbind(1)
    # Neither the cores nor the gradients have one layout among them.
    cores = [(0.1 * torch.randn(b, b, 2, device=device)).permute(2, 0, 1)]
    cores.append(0.1 * torch.randn(2, b, b, device=device))
    cores = [core.half().float() for core in cores]
    given = (x, Norm(mean, rstd, weight, bias), cores)
    grads = [torch.randn(width, device=device).half().expand(x.shape), torch.randn_like(x)]
    for out, exact in zip(
        kernel.norm_rotate(*given, HALF),
        ops.norm_rotate(*double(given), torch.float64),
        strict=True,
    ):
        assert out.is_contiguous()
        assert error(out, exact) < ROUNDED_TWICE
    *found, grad_cores = kernel.norm_rotate_grad(grads, *given, True, True)
    grad_x, grad_mean, grad_rstd, _, _, exact_cores = exact_grads(grads, given)
    for value, exact in zip(found, (grad_x, grad_mean, grad_rstd), strict=True):
        assert value.shape == exact.shape
        assert error(value, exact) < ROUNDING
    for value, exact in zip(grad_cores, exact_cores, strict=True):
        assert error(value, exact) < ROUNDED_TWICE


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_give_no_rows_and_zero_gradients(shape, device):
    x, cores = torch.zeros(shape, device=device).half(), list(torch.randn(2, 2, 4, 4).to(device))
    rstd = torch.zeros(*shape[:-1], 1, device=device)
    given = (x, Norm(None, rstd), cores)
    assert [out.shape for out in kernel.norm_rotate(*given, HALF)] == [x.shape] * 2
    grad_x, _, grad_rstd, grad_cores = kernel.norm_rotate_grad([x, x], *given, True, True)
    assert (grad_x.shape, grad_rstd.shape) == (x.shape, rstd.shape)
    assert not any(grad.any() for grad in grad_cores)


def test_many_runs_are_added_the_same_way_every_time(device, monkeypatch):
    monkeypatch.setattr(tiles, "processors", lambda device: 20)
    kernel._work.cache_clear()
    grads, given = case(3, 64 * 19, 1, 16, device)
    first = kernel.norm_rotate_grad(grads, *given, True, True)[-1]
    again = kernel.norm_rotate_grad(grads, *given, True, True)[-1]
    kernel._work.cache_clear()
    for value, same, exact in zip(first, again, exact_grads(grads, given)[-1], strict=True):
        assert torch.equal(value, same)
        assert error(value, exact) < ROUNDING


@pytest.mark.parametrize(
    ("rows", "programs", "backward"), [(128, 112, 112), (512, 224, 224), (4096, 1792, 224)]
)
def test_a_forward_has_short_runs_and_a_backward_as_many_as_are_at_work(
    rows, programs, backward, device, monkeypatch
):
    monkeypatch.setattr(tiles, "processors", lambda device: 132)
    dtypes = (HALF, HALF, torch.float32, None, torch.float32, HALF, None)
    problem = kernel.Problem(rows, 112, 32, 3, 3584, dtypes, device)
    work = kernel._work.__wrapped__  # without its cache
    strides = (1024, 32, 1)
    assert work(problem, 0, strides, 0, ()).launch._grid[0] == programs
    assert work(problem, 3584, strides, 3, (True, True)).launch._grid[0] == backward


def test_serves_what_it_says():
    def fits(count=2, dtype=HALF, b=8, x_dtype=HALF, grads=()):
        x = torch.zeros(b, dtype=x_dtype)
        return kernel.fits(x, [torch.zeros(1, b, b) for _ in range(count)], dtype, grads)

    assert all(fits(count) for count in (1, 2, 3))
    assert not fits(4)
    assert fits(x_dtype=torch.float32)
    assert fits(dtype=torch.bfloat16, x_dtype=torch.bfloat16)
    assert not fits(dtype=torch.float32, x_dtype=torch.float32)
    assert not fits(dtype=torch.bfloat16)
    assert fits(b=64)
    assert not fits(b=65)
    assert fits(1, b=128)
    assert not fits(1, b=129)
    half = torch.zeros(8, dtype=HALF)
    assert fits(grads=[half, half])
    assert not fits(grads=[half, half.float()])
    assert fits(1, grads=[half] * 3)
    assert not fits(1, grads=[half] * 4)
    assert not fits(2, grads=[half] * 3)
    assert not fits(1, b=128, grads=[half] * 2)
    mixed = [torch.zeros(1, 8, 8), torch.zeros(1, 8, 8, dtype=HALF)]
    assert not kernel.fits(half, mixed, HALF)
