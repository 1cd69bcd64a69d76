"""`oftfx::cayley_each`: the cores of several parameters, each as if it were alone."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition

from oftfx import ops
from oftfx.ops.cayley_each import served

EACH = torch.ops.oftfx.cayley_each.default
EACH_GRAD = torch.ops.oftfx.cayley_each_grad.default
JOINED = torch.ops.oftfx.cayley_joined.default


MODULE = importlib.import_module("oftfx.ops.cayley_each")


def _each(thetas: list[Tensor], b: int, order: int, dtype=None) -> list[Tensor]:
    cores = [ops.cayley(theta, b, order) for theta in thetas]
    return [core.to(dtype or core.dtype) for core in cores]


JOINING = SimpleNamespace(
    fits=lambda theta, b, order: order is not None,
    fits_each=lambda thetas, b: len(thetas) <= 8,
    cayley_each=_each,
    cayley_joined=lambda *args: torch.cat(_each(*args)),
    cayley_each_grad=lambda grads, thetas, b, order, dtype=None: MODULE.of_each(
        grads, thetas, b, order
    ),
)
"""Kernels that write all cores into one tensor, as Triton's do; of PyTorch, and of any dtype."""


@pytest.fixture(params=[False, True], ids=["by themselves", "joined"])
def joins(request, monkeypatch) -> bool:
    if request.param:
        monkeypatch.setattr(MODULE, "kernels", lambda *_: JOINING)
    return request.param


def thetas(n: int = 3, b: int = 4, count: int = 3, dtype=torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    made = [0.1 * torch.randn(n, b * (b - 1) // 2, dtype=dtype) for _ in range(count)]
    return [theta.requires_grad_() for theta in made]


@pytest.mark.parametrize(("n", "b", "order", "count"), [(4, 32, 4, 3), (1, 16, 3, 2), (3, 7, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_has_the_bits_of_each_alone(n, b, order, count, dtype, joins):
    together, alone = (thetas(n, b, count, dtype) for _ in range(2))
    assert_the_same(together, alone, b, order)


def test_they_may_differ_in_their_number_of_blocks(joins):
    together, alone = ([*thetas(2), *thetas(0, count=1), *thetas(5)] for _ in range(2))
    assert served(together, 4, 4) is joins
    assert_the_same(together, alone, 4, 4)


def assert_the_same(together: list[Tensor], alone: list[Tensor], b: int, order: int) -> None:
    """Cores and gradients, to the bit."""
    cores = ops.cayley_each(together, b, order)
    expected = [ops.cayley(theta, b, order) for theta in alone]
    assert all(map(torch.equal, cores, expected))
    grads = [torch.randn_like(core) for core in cores]
    torch.autograd.backward(cores, grads)
    torch.autograd.backward(expected, grads)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_without_a_kernel_that_rounds_earlier_they_are_rounded(dtype, joins):
    rounded, exact = thetas(), thetas()
    cores = ops.cayley_each(rounded, 4, 4, dtype)
    expected = [ops.cayley(theta, 4, 4).to(dtype) for theta in exact]
    assert all(map(torch.equal, cores, expected))
    grads = [torch.randn_like(core) for core in cores]
    torch.autograd.backward(cores, grads)
    torch.autograd.backward(expected, grads)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(rounded, exact, strict=True))


def test_one_that_nobody_uses_gets_no_gradient(joins):
    made = thetas()
    ops.cayley_each(made, 4, 4)[1].sum().backward()
    assert made[1].grad.any()
    assert not made[0].grad.any()


@pytest.mark.parametrize("op", [EACH, lambda *args: [JOINED(*args)]], ids=["each", "joined"])
def test_second_order(op, joins):
    def both(*made: Tensor) -> Tensor:
        return torch.cat([core.flatten() for core in op(list(made), 3, 4)])

    made = [*thetas(2, 3, 1, torch.float64), *thetas(1, 3, 1, torch.float64)]
    assert torch.autograd.gradcheck(both, made)
    assert torch.autograd.gradgradcheck(both, made)


def test_opcheck(joins):
    made = [*thetas(), *thetas(1)]
    torch.library.opcheck(EACH, (made, 4, 4))
    torch.library.opcheck(JOINED, (made, 4, 4))
    grads = [torch.randn(len(theta), 4, 4) for theta in made]
    torch.library.opcheck(EACH_GRAD, (grads, made, 4, 4))
    torch.library.opcheck(EACH_GRAD, (grads, made, 4, 4, torch.randn(10, 4, 4)))
    half = torch.float16
    torch.library.opcheck(EACH, (made, 4, 4, half))
    torch.library.opcheck(JOINED, (made, 4, 4, half))
    torch.library.opcheck(EACH_GRAD, ([grad.to(half) for grad in grads], made, 4, 4, None, half))


def test_results_share_no_memory_where_no_gradient_is_wanted(joins):
    with torch.no_grad():
        cores = ops.cayley_each(thetas(), 4, 4)
    assert len({core.untyped_storage().data_ptr() for core in cores}) == 3


def test_a_compiled_forward_hands_one_core_to_its_backward(joins):
    """Besides parameters, which it has anyway."""
    kept: list[list[tuple[int, ...]]] = []

    def forward(graph, inputs):
        outputs = graph.graph.find_nodes(op="output")[0].args[0][1:]
        computed = [node for node in outputs if node.op != "placeholder"]
        kept.append([tuple(node.meta["val"].shape) for node in computed])
        return graph

    def rotated(x: Tensor, *made: Tensor) -> Tensor:
        for core in ops.cayley_each(list(made), 4, 4):
            x = ops.rotate(x, core)
        return x

    x, made = torch.randn(3, 8), thetas(2)
    compiled = aot_function(
        rotated,
        fw_compiler=forward,
        bw_compiler=lambda graph, inputs: graph,
        partition_fn=min_cut_rematerialization_partition,
    )
    found = torch.autograd.grad(compiled(x, *made).square().sum(), made)
    expected = torch.autograd.grad(rotated(x, *made).square().sum(), made)
    torch.testing.assert_close(found, expected)
    assert [shape for shape in kept[0] if shape[1:] == (4, 4)] == (
        [(6, 4, 4)] if joins else [(2, 4, 4)] * 3
    )


def test_only_a_series_of_what_a_kernel_takes_is_served():
    assert not served(thetas(), 4, None)
    assert not served(thetas(dtype=torch.float64), 4, 4)
    assert not served([theta.to("meta") for theta in thetas()], 4, 4)
    assert not served([*thetas(), *thetas(2)], 4, 4)
