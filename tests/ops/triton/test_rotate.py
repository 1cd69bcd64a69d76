"""The rotation kernel beside the float64 reference: sizes, strides, masks and exactness.

bf16 products are right on a device only: the interpreter multiplies their bit patterns.
"""

import pytest
import torch

from oftfx import ops

kernel = pytest.importorskip("oftfx.ops.triton.rotate")

# (rows, n, b): one and many tiles, packs that are full, padded, cut off by n, and split in parts
SIZES = [
    (1, 1, 2),
    (3, 7, 2),
    (5, 3, 3),
    (65, 33, 4),
    (17, 5, 7),
    (130, 3, 16),
    (200, 5, 32),
    (64, 2, 32),
    (33, 1, 33),
    (20, 3, 48),
    (70, 2, 64),
    (9, 2, 96),
    (66, 1, 128),
    (17, 1, 256),
]
ROUNDING = {torch.float16: 3e-4, torch.float32: 1e-6}


def case(rows: int, n: int, b: int, dtype: torch.dtype, device: torch.device):
    grad, x = torch.randn(2, rows, n * b, device=device).to(dtype).unbind()
    # As the reference computes: with the core in x's dtype.
    core = (0.3 / b**0.5 * torch.randn(n, b, b, device=device)).to(dtype).float()
    return grad, x, core


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "n", "b"), SIZES)
def test_rotates_as_the_reference_does(rows, n, b, dtype, device):
    _, x, core = case(rows, n, b, dtype, device)
    rotated = kernel.rotate(x, core)
    assert rotated.dtype == dtype
    assert error(rotated, ops.rotate(x.double(), core.double())) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "n", "b"), SIZES)
def test_gradients_are_the_references(rows, n, b, dtype, device):
    grad, x, core = case(rows, n, b, dtype, device)
    grad_x, grad_core = kernel.rotate_grad(grad, x, core, True, True)
    exact_x, exact_core = ops.rotate_grad(
        grad.double(), x.double(), core.double(), need_x=True, need_core=True
    )
    assert (grad_x.dtype, grad_core.dtype) == (dtype, core.dtype)
    assert error(grad_x, exact_x) < ROUNDING[dtype]
    assert error(grad_core, exact_core) < 1e-6  # summed in float32, whatever x is


@pytest.mark.parametrize(("n", "b", "stride"), [(6, 16, 3), (8, 16, 2), (40, 2, 20), (4, 128, 2)])
def test_blocks_of_distant_coordinates(n, b, stride, device):
    grad, x, core = case(70, n, b, torch.float32, device)
    exact = ops.rotate(x.double(), core.double(), stride)
    assert error(kernel.rotate(x, core, stride), exact) < 1e-6
    exacts = ops.rotate_grad(grad.double(), x.double(), core.double(), True, True, stride)
    ours = kernel.rotate_grad(grad, x, core, True, True, stride)
    assert all(error(*pair) < 1e-6 for pair in zip(ours, exacts, strict=True))


@pytest.mark.parametrize(("rows", "n", "b"), [(65, 33, 4), (200, 5, 32), (33, 1, 33), (17, 1, 256)])
def test_a_zero_core_is_the_identity_to_the_last_bit(rows, n, b, device):
    for dtype in (torch.float16, torch.float32, torch.bfloat16)[: 2 if device.type == "cpu" else 3]:
        info = torch.finfo(dtype)
        # Not the largest float32 itself: a device splits it in parts, and rounds one to infinity.
        edges = torch.tensor([info.max / 2, -info.max / 2, info.tiny, info.smallest_normal / 2])
        x = torch.cat([edges.to(dtype), torch.randn(rows * n * b - 4).to(dtype)])
        x = x.reshape(rows, n * b).to(device)
        assert torch.equal(kernel.rotate(x, torch.zeros(n, b, b, device=device)), x)


@pytest.mark.parametrize(("need_x", "need_core"), [(True, False), (False, True), (False, False)])
def test_half_the_gradient_is_the_same_half(need_x, need_core, device):
    grad, x, core = case(70, 5, 8, torch.float32, device)
    whole_x, whole_core = kernel.rotate_grad(grad, x, core, True, True)
    grad_x, grad_core = kernel.rotate_grad(grad, x, core, need_x, need_core)
    assert (grad_x.numel() > 0, grad_core.numel() > 0) == (need_x, need_core)
    if need_x:
        assert torch.equal(grad_x, whole_x)
    if need_core:
        torch.testing.assert_close(grad_core, whole_core)


@pytest.mark.parametrize("b", [8, 12, 128])
@pytest.mark.parametrize("layout", ["rows apart", "transposed", "expanded", "4-D", "1-D"])
def test_operands_may_have_any_strides(layout, b, device):
    width = 2 * b
    x = {
        "rows apart": lambda: torch.randn(6, width + 5)[:, 2:-3],
        "transposed": lambda: torch.randn(width, 6).T,
        "expanded": lambda: torch.randn(1, width).expand(6, width),
        "4-D": lambda: torch.randn(3, 2, 4, width).transpose(0, 2),
        "1-D": lambda: torch.randn(width),
    }[layout]().to(device)
    core = (0.1 * torch.randn(b, b, 2, device=device)).permute(2, 0, 1)
    grad = torch.randn(width, device=device).expand(x.shape)
    exact = ops.rotate(x.double(), core.double())
    assert kernel.rotate(x, core).is_contiguous()
    assert error(kernel.rotate(x, core), exact) < 1e-6
    assert error(kernel.rotate(x, core.mT), ops.rotate(x.double(), core.mT.double())) < 1e-6
    ours = kernel.rotate_grad(grad, x, core, True, True)
    exact_grads = ops.rotate_grad(grad.double(), x.double(), core.double(), True, True)
    for value, reference in zip(ours, exact_grads, strict=True):
        assert error(value, reference) < 1e-6


def test_an_unaligned_operand_does_not_meet_code_for_an_aligned_one(device):
    """The second call with the same sizes takes the kept code, unless its addresses differ."""
    core = 0.1 * torch.randn(3, 16, 16, device=device)
    held = torch.randn(40 * 48 + 1, device=device)
    for offset in (0, 1, 0, 1):
        x = held[offset : offset + 40 * 48].view(40, 48)
        assert error(kernel.rotate(x, core), ops.rotate(x.double(), core.double())) < 1e-6


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_give_no_rows_and_a_zero_gradient(shape, device):
    x, core = torch.zeros(shape, device=device), torch.randn(2, 4, 4, device=device)
    assert kernel.rotate(x, core).shape == shape
    grad_x, grad_core = kernel.rotate_grad(x, x, core, True, True)
    assert grad_x.shape == shape
    assert torch.equal(grad_core, torch.zeros_like(core))


def test_no_blocks_give_nothing(device):
    x, core = torch.zeros(3, 0, device=device), torch.zeros(0, 4, 4, device=device)
    assert kernel.rotate(x, core).shape == (3, 0)
    assert kernel.rotate_grad(x, x, core, True, True)[1].shape == (0, 4, 4)


def test_a_core_of_another_dtype_is_cast_and_its_gradient_cast_back(device):
    grad, x, core = case(20, 3, 8, torch.float32, device)
    for dtype in (torch.float64, torch.float16):
        grad_x, grad_core = kernel.rotate_grad(grad, x, core.to(dtype), True, True)
        assert (grad_x.dtype, grad_core.dtype) == (torch.float32, dtype)


def test_the_same_input_gives_the_same_bits(device):
    grad, x, core = case(300, 4, 16, torch.float32, device)
    first = kernel.rotate_grad(grad, x, core, True, True)
    again = kernel.rotate_grad(grad, x, core, True, True)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_serves_the_dtypes_and_widths_it_says():
    core = torch.zeros(1, 8, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert kernel.fits(torch.zeros(8, dtype=dtype), core)
    assert not kernel.fits(torch.zeros(8, dtype=torch.float64), core)
    assert kernel.fits(torch.zeros(256), torch.zeros(1, 256, 256))
    assert not kernel.fits(torch.zeros(257), torch.zeros(1, 257, 257))
