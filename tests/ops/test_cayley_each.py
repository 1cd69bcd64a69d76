"""`oftfx::cayley_each`: the cores of several parameters, each as if it were alone."""

import pytest
import torch
from torch import Tensor

from oftfx import ops
from oftfx.ops.cayley_each import served

EACH = torch.ops.oftfx.cayley_each.default
EACH_GRAD = torch.ops.oftfx.cayley_each_grad.default


def thetas(n: int = 3, b: int = 4, count: int = 3, dtype=torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    made = [0.1 * torch.randn(n, b * (b - 1) // 2, dtype=dtype) for _ in range(count)]
    return [theta.requires_grad_() for theta in made]


@pytest.mark.parametrize(("n", "b", "order", "count"), [(4, 32, 4, 3), (1, 16, 3, 2), (3, 7, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_has_the_bits_of_each_alone(n, b, order, count, dtype):
    together, alone = (thetas(n, b, count, dtype) for _ in range(2))
    cores = ops.cayley_each(together, b, order)
    expected = [ops.cayley(theta, b, order) for theta in alone]
    assert all(map(torch.equal, cores, expected))
    grads = [torch.randn_like(core) for core in cores]
    torch.autograd.backward(cores, grads)
    torch.autograd.backward(expected, grads)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(together, alone, strict=True))


def test_one_that_nobody_uses_gets_no_gradient():
    made = thetas()
    ops.cayley_each(made, 4, 4)[1].sum().backward()
    assert made[1].grad.any()
    assert not made[0].grad.any()


def test_second_order():
    def both(*made: Tensor) -> Tensor:
        return torch.cat([core.flatten() for core in ops.cayley_each(list(made), 3, 4)])

    assert torch.autograd.gradgradcheck(both, thetas(2, 3, 2, torch.float64))


def test_opcheck():
    made = thetas()
    torch.library.opcheck(EACH, (made, 4, 4))
    torch.library.opcheck(EACH_GRAD, ([torch.randn(3, 4, 4) for _ in made], made, 4, 4))


def test_only_a_series_of_what_a_kernel_takes_is_served():
    assert not served(thetas(), 4, None)
    assert not served(thetas(dtype=torch.float64), 4, 4)
    assert not served([theta.to("meta") for theta in thetas()], 4, 4)
