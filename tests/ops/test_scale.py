"""`oftfx::scale`: schema, fake, autograd and values."""

import pytest
import torch

from oftfx import ops

SCALE = torch.ops.oftfx.scale.default

# (shape of y, shape of what is not scaled, dtype of y, dtype of the magnitude)
CASES = {
    "rows": ((5, 6), (6,), torch.float64, torch.float64),
    "no bias": ((2, 5, 6), None, torch.float32, torch.float32),
    "no rows": ((0, 6), (6,), torch.float32, torch.float32),
    "1-D": ((6,), (6,), torch.float32, torch.float32),
    "a whole tensor beside it": ((5, 6), (5, 6), torch.float32, torch.float32),
    "bf16": ((2, 5, 6), (6,), torch.bfloat16, torch.float32),
}


def case(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    shape, beside, dtype, held = CASES[name]
    bias = None if beside is None else torch.randn(beside).to(dtype)
    return torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(held), bias


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    y, magnitude, bias = case(name)
    tolerance = 2e-2 if name == "bf16" else None
    operands = (y.requires_grad_(), magnitude.requires_grad_(), bias)
    torch.library.opcheck(SCALE, operands, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c[2] != torch.bfloat16])
def test_all_but_the_bias_is_scaled(name):
    y, magnitude, bias = case(name)
    rest = 0 if bias is None else bias
    expected = (y - rest) * (1 + magnitude) + rest
    torch.testing.assert_close(ops.scale(y, magnitude, bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_keep_every_bit(dtype):
    """Also of numbers whose distance from the bias leaves the dtype's range."""
    largest = torch.finfo(dtype).max
    y = torch.cat([torch.randn(64) * 10.0 ** torch.randint(-30, 30, (64,)), -torch.zeros(1)])
    y = torch.cat(
        [y.to(dtype).clamp(-largest, largest), torch.tensor([largest, -largest], dtype=dtype)]
    )
    bias = -y.flip(0)
    zeros = torch.zeros(len(y))
    assert torch.equal(ops.scale(y, zeros, bias), y)
    assert torch.equal(ops.scale(y, zeros, None), y)


def test_gradients_of_all_three_and_of_the_gradients():
    y, magnitude, bias = (t.double().requires_grad_() for t in case("rows"))
    assert torch.autograd.gradcheck(ops.scale, (y, magnitude, bias))
    assert torch.autograd.gradgradcheck(ops.scale, (y, magnitude, bias))


def test_gradients_of_half_precision_parameters_are_rounded_once():
    y, bias = torch.randn(500, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    magnitude = torch.randn(6).bfloat16().requires_grad_()
    ops.scale(y, magnitude, bias).square().sum().backward()
    exact = magnitude.detach().double().requires_grad_()
    ops.scale(y, exact, bias).square().sum().backward()
    assert torch.equal(magnitude.grad, exact.grad.bfloat16())


def test_the_result_lies_in_memory_as_y_does():
    """A weight scaled by its rows is stored as it was, so that its matmul rounds as it did."""
    y = torch.randn(5, 6).mT
    assert ops.scale(y, torch.randn(5), None).stride() == y.stride()


def test_what_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match=r"y of shape \(5, 6\) and a magnitude of shape \(5,\)"):
        ops.scale(torch.randn(5, 6), torch.randn(5), None)
