"""Of a product its factors are kept, which autograd keeps anyway, and it is made again."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oftfx import ops
from oftfx.ops.kept import again, kept
from tests.packed import random_packed

CORE = 0.1 * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))


def gated(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Two factors with gradients, and their product."""
    torch.manual_seed(0)
    gate, up = (torch.randn(6, 32, dtype=dtype, requires_grad=True) for _ in range(2))
    factors = F.silu(gate), up * 1
    return *factors, factors[0] * factors[1]


def places(tensors) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_product_the_factors_are_kept_and_give_its_bits(dtype):
    a, b, x = gated(dtype)
    assert places(kept(x)) == places([a, b])
    assert torch.equal(again(kept(x)), x)


def norm() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An RMSNorm as models write it: its input, the rows' factors, a frozen weight; its output."""
    torch.manual_seed(0)
    h, weight = torch.randn(6, 32, requires_grad=True) * 1, torch.randn(32)
    rows = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return h, rows, weight, weight * (h * rows)


def test_of_a_norm_with_a_frozen_weight_the_input_is_kept():
    h, rows, weight, x = norm()
    assert places(kept(x)) == places([h, rows, weight])
    assert torch.equal(again(kept(x)), x)


def test_a_norm_in_a_wider_dtype_is_kept_itself():
    h = torch.randn(6, 32, dtype=torch.bfloat16, requires_grad=True).float()
    x = torch.randn(32).bfloat16() * (h * h.mean(-1, keepdim=True)).bfloat16()
    assert places(kept(x)) == places([x])


def test_rotations_keep_no_product():
    weight = random_packed(16, 32)
    a, b, x = gated()
    core = CORE.clone().requires_grad_()
    (group,) = ops.rotate_group(x, [core])
    for y in (ops.rotate(x, core), group, ops.rotated_linear(x, core, weight)):
        held = places(y.grad_fn.saved_tensors)
        assert x.data_ptr() not in held
        assert set(places([a, b, core])) <= set(held)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("group", [False, True])
def test_gradients_are_those_of_keeping_it(order, group):
    def gradients(keep: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        leaves = [torch.randn(6, 32, requires_grad=True) for _ in range(2)]
        core = CORE.clone().requires_grad_()
        x = F.silu(leaves[0]) * leaves[1]
        x = x.clone() if keep else x
        y = sum(ops.rotate_group(x, [core, 2 * core])) if group else ops.rotate(x, core)
        found = torch.autograd.grad(y.square().sum(), [*leaves, core], create_graph=order == 2)
        if order == 1:
            return found
        return torch.autograd.grad(sum(each.sin().sum() for each in found), [*leaves, core])

    for got, expected in zip(gradients(keep=False), gradients(keep=True), strict=True):
        torch.testing.assert_close(got, expected)


def test_what_is_no_product_of_two_kept_tensors_is_kept_itself():
    a, b, x = gated()
    frozen = torch.randn(32)
    others = [a + b, a * 2, a * frozen, x.detach(), torch.randn(3), x.view(2, 3, 32)]
    for other in others:
        assert places(kept(other)) == places([other])


def test_a_product_that_was_written_to_is_kept_itself():
    _, _, x = gated()
    with torch.no_grad():
        x.detach().mul_(2)
    assert places(kept(x)) == places([x])


def test_where_a_factor_was_written_to_the_forward_still_runs():
    _, b, x = gated()
    with torch.no_grad():
        b.detach().mul_(2)
    assert torch.equal(ops.rotate(x, CORE.clone().requires_grad_()), ops.rotate(x.detach(), CORE))


def test_hooks_on_what_is_kept_see_it_whole():
    """They may have put anything in the factors' place: a recipe, a copy on another device."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: pytest.fail("was read")):
        _, _, x = gated()
        assert places(kept(x)) == places([x])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    def gradient(run) -> Tensor:
        torch.manual_seed(0)
        gate, up = (torch.randn(6, 32, requires_grad=True) for _ in range(2))
        core = CORE.clone().requires_grad_()
        run(
            lambda gate, up: ops.rotate(F.silu(gate) * up, core), gate, up
        ).square().sum().backward()
        return core.grad

    got = gradient(lambda f, *given: checkpoint(f, *given, use_reentrant=reentrant))
    assert torch.equal(got, gradient(lambda f, *given: f(*given)))
