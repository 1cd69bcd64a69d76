"""The grouped rotation kernels beside the float64 reference: counts, sizes, strides, exactness.

bf16 products are right on a device only: the interpreter multiplies their bit patterns.
"""

import pytest
import torch

from oftfx import ops

kernel = pytest.importorskip("oftfx.ops.triton.rotate_group")
tiles = pytest.importorskip("oftfx.ops.triton.tiles")

# (rows, n, b): one and many tiles, packs that are full, padded, cut off by n, and split in parts
SIZES = [(3, 7, 2), (65, 33, 4), (17, 5, 7), (200, 5, 32), (64, 2, 32), (33, 1, 33), (70, 2, 64)]
ROUNDING = {torch.float16: 3e-4, torch.float32: 1e-6}


def case(count: int, rows: int, n: int, b: int, dtype: torch.dtype, device: torch.device):
    x, *grads = torch.randn(count + 1, rows, n * b, device=device).to(dtype).unbind()
    # As the reference computes: with the cores in x's dtype.
    cores = (0.3 / b**0.5 * torch.randn(count, n, b, b, device=device)).to(dtype).float()
    return grads, x, list(cores.unbind())


def doubles(tensors):
    return [tensor.double() for tensor in tensors]


def exact_grads(grads, x, cores):
    return ops.rotate_group_grad(doubles(grads), x.double(), doubles(cores), True, True)


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "n", "b"), SIZES)
def test_rotates_as_the_reference_does(count, rows, n, b, dtype, device):
    _, x, cores = case(count, rows, n, b, dtype, device)
    outs = kernel.rotate_group(x, cores)
    assert len(outs) == count
    for out, core in zip(outs, cores, strict=True):
        assert out.dtype == dtype
        assert error(out, ops.rotate(x.double(), core.double())) < ROUNDING[dtype]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("rows", "n", "b"), SIZES)
def test_gradients_are_the_references(count, rows, n, b, device):
    grads, x, cores = case(count, rows, n, b, torch.float16, device)
    grad_x, grad_cores = kernel.rotate_group_grad(grads, x, cores, True, True)
    exact_x, exact_cores = exact_grads(grads, x, cores)
    assert grad_x.dtype == torch.float16
    # Added in float32 and rounded once: as exact as one rotation's.
    assert error(grad_x, exact_x) < ROUNDING[torch.float16]
    assert len(grad_cores) == count
    for value, exact in zip(grad_cores, exact_cores, strict=True):
        assert value.dtype == torch.float32
        assert error(value, exact) < 1e-6  # summed in float32, whatever x is


@pytest.mark.parametrize(("rows", "n", "b"), [(65, 33, 4), (200, 5, 32), (33, 1, 33)])
def test_zero_cores_are_the_identity_to_the_last_bit(rows, n, b, device):
    for dtype in (torch.float16, torch.float32, torch.bfloat16)[: 2 if device.type == "cpu" else 3]:
        info = torch.finfo(dtype)
        edges = torch.tensor([info.max / 2, -info.max / 2, info.tiny, info.smallest_normal / 2])
        x = torch.cat([edges.to(dtype), torch.randn(rows * n * b - 4).to(dtype)])
        x = x.reshape(rows, n * b).to(device)
        for count in (2, 3):
            outs = kernel.rotate_group(x, [torch.zeros(n, b, b, device=device)] * count)
            assert all(torch.equal(out, x) for out in outs)


@pytest.mark.parametrize(("need_x", "need_cores"), [(True, False), (False, True), (False, False)])
def test_half_the_gradient_is_the_same_half(need_x, need_cores, device):
    grads, x, cores = case(3, 70, 5, 8, torch.float16, device)
    whole_x, whole_cores = kernel.rotate_group_grad(grads, x, cores, True, True)
    grad_x, grad_cores = kernel.rotate_group_grad(grads, x, cores, need_x, need_cores)
    assert (grad_x.numel() > 0, grad_cores[0].numel() > 0) == (need_x, need_cores)
    if need_x:
        assert torch.equal(grad_x, whole_x)
    if need_cores:
        torch.testing.assert_close(grad_cores, whole_cores)


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "expanded", "4-D", "1-D"])
def test_operands_may_have_any_strides(layout, device):
    b, width = 12, 24
    x = {
        "rows apart": lambda: torch.randn(6, width + 5)[:, 2:-3],
        "transposed": lambda: torch.randn(width, 6).T,
        "expanded": lambda: torch.randn(1, width).expand(6, width),
        "4-D": lambda: torch.randn(3, 2, 4, width).transpose(0, 2),
        "1-D": lambda: torch.randn(width),
    }[layout]().to(device)
    # Neither the cores nor the gradients have one layout among them.
    cores = [(0.1 * torch.randn(b, b, 2, device=device)).permute(2, 0, 1)]
    cores.append(0.1 * torch.randn(2, b, b, device=device))
    half = x.half()
    grads = [torch.randn(width, device=device).half().expand(x.shape), torch.randn_like(half)]
    for out, core in zip(kernel.rotate_group(x, cores), cores, strict=True):
        assert out.is_contiguous()
        assert error(out, ops.rotate(x.double(), core.double())) < 1e-6
    cores = [core.half().float() for core in cores]
    assert cores[0].stride() != cores[1].stride()
    grad_x, grad_cores = kernel.rotate_group_grad(grads, half, cores, True, True)
    exact_x, exact_cores = exact_grads(grads, half, cores)
    assert error(grad_x, exact_x) < ROUNDING[torch.float16]
    for value, exact in zip(grad_cores, exact_cores, strict=True):
        assert error(value, exact) < 1e-6


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_give_no_rows_and_zero_gradients(shape, device):
    x, cores = torch.zeros(shape, device=device).half(), list(torch.randn(2, 2, 4, 4).to(device))
    assert [out.shape for out in kernel.rotate_group(x, cores)] == [x.shape] * 2
    grad_x, grad_cores = kernel.rotate_group_grad([x, x], x, cores, True, True)
    assert grad_x.shape == shape
    assert not any(grad.any() for grad in grad_cores)


def test_no_blocks_give_nothing(device):
    x, cores = torch.zeros(3, 0, device=device).half(), [torch.zeros(0, 4, 4, device=device)] * 2
    assert kernel.rotate_group(x, cores)[0].shape == (3, 0)
    assert kernel.rotate_group_grad([x, x], x, cores, True, True)[1][0].shape == (0, 4, 4)


def test_cores_of_another_dtype_are_cast_and_their_gradients_cast_back(device):
    grads, x, cores = case(2, 20, 3, 8, torch.float16, device)
    for dtype in (torch.float64, torch.float16):
        given = [core.to(dtype) for core in cores]
        grad_x, grad_cores = kernel.rotate_group_grad(grads, x, given, True, True)
        assert (grad_x.dtype, *(grad.dtype for grad in grad_cores)) == (torch.float16, dtype, dtype)


def test_many_runs_are_added_the_same_way_every_time(device, monkeypatch):
    """More runs than are read at a time; their sum is exact and repeats to the last bit."""
    monkeypatch.setattr(tiles, "processors", lambda device: 20)
    kernel._work.cache_clear()
    grads, x, cores = case(3, 64 * 19, 1, 16, torch.float16, device)
    first = kernel.rotate_group_grad(grads, x, cores, True, True)
    again = kernel.rotate_group_grad(grads, x, cores, True, True)
    kernel._work.cache_clear()
    for value, same, exact in zip(first[1], again[1], exact_grads(grads, x, cores)[1], strict=True):
        assert torch.equal(value, same)
        assert error(value, exact) < 1e-6


def test_serves_what_it_says():
    def fits(count=2, dtype=torch.float32, b=8, **other):
        x = torch.zeros(b, dtype=dtype)
        return kernel.fits(x, [torch.zeros(1, b, b) for _ in range(count)], **other)

    assert all(fits(count) for count in (2, 3))
    assert not any(fits(count) for count in (1, 4))
    assert all(fits(dtype=dtype) for dtype in (torch.bfloat16, torch.float16))
    assert not fits(dtype=torch.float64)
    assert fits(b=64)
    assert not fits(b=65)
    half = torch.zeros(8, dtype=torch.float16)
    assert fits(dtype=torch.float16, grads=[half, half])
    assert not fits(dtype=torch.float16, grads=[half, half.float()])
    assert not fits(grads=[half.float(), half.float()])
    mixed = [torch.zeros(1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.float16)]
    assert not kernel.fits(torch.zeros(8), mixed)
