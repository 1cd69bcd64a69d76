"""Weights of 16 bits folded in float32 and rounded once, beside the float64 reference."""

import pytest
import torch

from oftfx import ops

kernel = pytest.importorskip("oftfx.ops.triton.fold")

# (rows, n, b): packs that are whole and cut off, several runs, a block that is no power of two
SIZES = [(5, 3, 16), (70, 2, 32), (300, 1, 64), (9, 3, 20), (130, 5, 2), (0, 2, 8)]
# Triton's interpreter cuts digits off where it should round to bfloat16.
DTYPES = [torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
HALF = torch.float16


def case(rows, n, b, dtype, device):
    weight = torch.randn(rows, n * b, device=device).to(dtype)
    core = 0.3 / b**0.5 * torch.randn(n, b, b, device=device)
    return weight, core, ops.rotate(weight.double(), core.double().mT)


def assert_rounded(value: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """To the nearest of the dtype, but for what is as near to the middle of two as 20 bits tell."""
    assert value.dtype == dtype
    wrong = (value != exact.to(dtype)).sum()
    assert wrong <= 1 + 2**-20 / torch.finfo(dtype).eps * 4 * value.numel()
    assert (value.double() - exact).norm() <= torch.finfo(dtype).eps / 2 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "b"), SIZES)
def test_it_rounds_once(rows, n, b, dtype, device):
    weight, core, exact = case(rows, n, b, dtype, device)
    assert kernel.fits(weight, core)
    assert_rounded(kernel.folded(weight, core, dtype, None), exact, dtype)
    turned = core.mT.contiguous().mT
    assert_rounded(kernel.folded(weight, turned, dtype, None), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [4, 32, 64])
def test_in_its_own_memory(b, dtype, device):
    weight, core, exact = case(200, 5, b, dtype, device)
    address = weight.data_ptr()
    assert kernel.folded(weight, core, dtype, weight) is weight
    assert weight.data_ptr() == address
    assert_rounded(weight, exact, dtype)


def test_a_graph_that_read_the_weight_knows(device):
    weight, core, _ = case(40, 3, 16, HALF, device)
    x = torch.randn(5, 48, device=device, dtype=HALF, requires_grad=True)
    y = (x @ weight.T).sum()
    kernel.folded(weight[:8], core, HALF, weight[:8])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_rows_apart_and_a_place_with_rows_of_its_own(device):
    weight, core, exact = case(40, 3, 16, HALF, device)
    wide = torch.zeros(40, 60, dtype=HALF, device=device)
    wide[:, 7:55] = weight
    into = torch.zeros(48, 40, dtype=HALF, device=device).mT
    assert kernel.folded(wide[:, 7:55], core, HALF, into) is into
    assert_rounded(into, exact, HALF)
    kernel.folded(weight, core, HALF, wide[:, 7:55])
    assert_rounded(wide[:, 7:55], exact, HALF)
    assert not wide[:, :7].any()
    assert not wide[:, 55:].any()


def test_what_it_leaves_to_others(device):
    weight, core, _ = case(40, 3, 16, HALF, device)
    assert not kernel.fits(weight.float(), core)  # not 16 bits
    assert not kernel.fits(weight, core.bfloat16())  # computed in 16 bits
    assert not kernel.fits(weight, core[:1])  # one core for all blocks
    assert not kernel.fits(torch.empty(48, 48, dtype=weight.dtype, device=device).mT, core)
    assert not kernel.fits(weight[:1].expand(40, 48), core)  # one row, which all would turn
    assert not kernel.fits(*case(4, 1, 128, HALF, device)[:2])
