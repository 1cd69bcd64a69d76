"""The kernels of 4-bit weights beside the reference: every bit of W, and the digits of W̃.

bf16 is right on a device only: the interpreter cuts its digits off and multiplies their patterns.
"""

import pytest
import torch

from oftfx import ops
from oftfx.ops import packed
from tests.packed import random_packed

kernel = pytest.importorskip("oftfx.ops.triton.dequantise")
divide = pytest.importorskip("oftfx.ops.triton.divide")

# (out, in, b): packs that are full, cut off, and as wide as a block; tiles cut off
SIZES = [(3, 32, 16), (70, 96, 32), (65, 160, 32), (5, 128, 64), (66, 256, 128), (129, 64, 16)]
ROUNDING = {torch.float16: 1e-3, torch.float32: 1e-6}


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def random_core(width: int, b: int, device: torch.device) -> torch.Tensor:
    return 0.3 / b**0.5 * torch.randn(width // b, b, b, device=device)


@pytest.mark.parametrize(("block_size", "double"), [(32, True), (64, False), (4096, True)])
@pytest.mark.parametrize(("out", "width", "b"), SIZES)
def test_folds_as_the_reference_does(out, width, b, block_size, double, device):
    weight = random_packed(out, width, "nf4", block_size, double, device)
    core = random_core(width, b, device)
    for dtype, rounding in ROUNDING.items():
        assert kernel.fits(weight, b, dtype)
        exact = ops.rotate(packed.dequantised(weight, torch.float64), core.double().mT)
        folded = kernel.folded(weight, core, dtype)
        assert folded.dtype is dtype
        assert error(folded, exact) < rounding


@pytest.mark.parametrize(("quant_type", "storage"), [("nf4", torch.uint8), ("fp4", torch.bfloat16)])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dequantises_to_the_references_bits(dtype, double, quant_type, storage, device):
    weight = random_packed(33, 160, quant_type, 64, double, device, storage)
    expected = packed.dequantised(weight, dtype)
    assert torch.equal(kernel.dequantised(weight, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("double", [False, True])
def test_without_a_rotation_it_folds_to_the_weights_own_bits(double, dtype, device):
    weight = random_packed(33, 160, double=double, device=device)
    core = torch.zeros(5, 32, 32, device=device)
    assert torch.equal(kernel.folded(weight, core, dtype), packed.dequantised(weight, dtype))


def test_cores_may_have_any_strides(device):
    weight, core = random_packed(9, 96, device=device), random_core(96, 32, device)
    folded = kernel.folded(weight, core.mT, torch.float32)
    assert error(folded, ops.rotate(packed.dequantised(weight, torch.float64), core.double())) < (
        1e-6
    )


def test_serves_blocks_of_its_widths_alone():
    weight = random_packed(4, 96)
    assert kernel.fits(weight, 32, torch.float16)
    for b in (8, 48, 64, 96):
        assert not kernel.fits(weight, b, torch.float16)
    assert not kernel.fits(weight, 32, torch.float64)
    assert not kernel.fits(random_packed(4, 30), None, torch.float16)


@pytest.mark.parametrize("b", [16, 32, 64])
def test_divides_by_what_is_not_quite_a_rotation(b, device):
    gram = torch.randn(2, b, b, device=device)
    core = 0.5 / b**0.5 * torch.randn(2, b, b, device=device)
    assert divide.fits(gram, core)
    turn = torch.eye(b, dtype=torch.float64, device=device) + core.double()
    exact = gram.double() @ torch.linalg.inv(turn).mT
    assert error(divide.divided(gram, core), exact) < 1e-6
    assert error(divide.divided(gram, core.mT), gram.double() @ torch.linalg.inv(turn)) < 1e-6


def test_needs_no_pivots(device):
    """Quarter turns have a diagonal of zeros."""
    turn = torch.zeros(1, 16, 16, device=device)
    turn[0, range(0, 16, 2), range(1, 16, 2)] = 1.0
    turn -= turn.mT.clone()
    gram = torch.randn(1, 16, 16, device=device)
    core = turn - torch.eye(16, device=device)
    assert error(divide.divided(gram, core), (gram @ turn).double()) < 1e-6
