"""The cores of several parameters in one launch: to the bit those of each alone."""

import importlib
import itertools

import pytest
import torch

from oftfx.ops.cayley_each import served

kernel = pytest.importorskip("oftfx.ops.triton.cayley_each")
alone = pytest.importorskip("oftfx.ops.triton.cayley")

# The interpreter multiplies no bfloat16.
SHORT = [torch.float16, *[torch.bfloat16] * torch.cuda.is_available()]

# Blocks that fill no pack, none at all, one; as many tensors as a launch takes; one tensor.
COUNTS = [(3, 1, 0, 7), (0, 2), (1, 2, 3, 4, 5, 1, 2, 3), (5,)]


def several(
    counts: tuple[int, ...], b: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    return [
        (0.3 / b**0.5 * torch.randn(n, b * (b - 1) // 2, device=device)).to(dtype) for n in counts
    ]


@pytest.mark.parametrize(("b", "order"), [*itertools.product([2, 3, 4, 7, 16, 32], [3, 4])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
def test_several_have_the_bits_of_each_alone(counts, dtype, b, order, device):
    assert_the_same(several(counts, b, dtype, device), b, order)


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("b", [5, 31, 33, 64])
def test_several_wide_ones_and_other_orders_have_the_bits_of_each_alone(b, order, device):
    assert_the_same(several((2, 1), b, torch.float16, device), b, order)


def test_several_may_have_any_strides(device):
    thetas = [theta.T.contiguous().T for theta in several((6, 2), 4, torch.float32, device)]
    assert not thetas[0].is_contiguous()
    assert_the_same(thetas, 4, 4)
    grads = [torch.randn(4, 4, device=device).expand(n, 4, 4) for n in (6, 2)]
    found = kernel.cayley_each_grad([grads[0].double(), grads[1].bfloat16()], thetas, 4, 4)
    assert torch.equal(found[0], alone.cayley_grad(grads[0], thetas[0], 4, 4))
    assert torch.equal(found[1], alone.cayley_grad(grads[1].bfloat16(), thetas[1], 4, 4))


def assert_the_same(thetas: list[torch.Tensor], b: int, order: int) -> None:
    """Cores and gradients, to the bit."""
    cores = kernel.cayley_each(thetas, b, order)
    expected = [alone.cayley(theta, b, order) for theta in thetas]
    assert all(map(torch.equal, cores, expected))
    assert torch.equal(kernel.cayley_joined(thetas, b, order), torch.cat(expected))
    grads = [torch.randn_like(core) for core in cores]
    found = kernel.cayley_each_grad(grads, thetas, b, order)
    one_by_one = [alone.cayley_grad(*pair, b, order) for pair in zip(grads, thetas, strict=True)]
    assert all(map(torch.equal, found, one_by_one))
    assert [grad.dtype for grad in found] == [theta.dtype for theta in thetas]


def test_serves_up_to_eight_together(device, monkeypatch):
    module = importlib.import_module("oftfx.ops.cayley_each")
    monkeypatch.setattr(module, "kernels", lambda *_: kernel)
    thetas = several((1, 2, 3, 4, 5, 1, 2, 3), 4, torch.float32, device)
    assert served(thetas, 4, 4)
    assert not served(thetas, 4, None)
    assert not served([*thetas, thetas[0]], 4, 4)
    assert not served([thetas[0], thetas[1].bfloat16()], 4, 4)
    assert not served([thetas[0], thetas[1][0]], 4, 4)
    assert not served(several((1, 2), 65, torch.float32, device), 65, 4)
    assert not served([theta.double() for theta in thetas], 4, 4)


def as_it_is(function):
    return function


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("run", [as_it_is, compiled])
def test_the_ops_run_them(run, device, monkeypatch):
    module = importlib.import_module("oftfx.ops.cayley_each")
    monkeypatch.setattr(module, "kernels", lambda *_: kernel)
    thetas = [theta.requires_grad_() for theta in several((3, 1), 4, torch.float32, device)]
    cores = run(lambda *given: torch.ops.oftfx.cayley_each(list(given), 4, 4))(*thetas)
    grads = [torch.randn_like(core) for core in cores]
    found = torch.autograd.grad(cores, thetas, grads)
    bare = [theta.detach() for theta in thetas]
    assert all(map(torch.equal, cores, kernel.cayley_each(bare, 4, 4)))
    assert all(map(torch.equal, found, kernel.cayley_each_grad(grads, bare, 4, 4)))


def test_opcheck_of_several(device, monkeypatch):
    module = importlib.import_module("oftfx.ops.cayley_each")
    monkeypatch.setattr(module, "kernels", lambda *_: kernel)
    thetas = [theta.requires_grad_() for theta in several((3, 1), 4, torch.float32, device)]
    torch.library.opcheck(torch.ops.oftfx.cayley_each.default, (thetas, 4, 4))
    torch.library.opcheck(torch.ops.oftfx.cayley_joined.default, (thetas, 4, 4))
    grads = [torch.randn(n, 4, 4, device=device) for n in (3, 1)]
    bare = [theta.detach() for theta in thetas]
    torch.library.opcheck(torch.ops.oftfx.cayley_each_grad.default, (grads, bare, 4, 4))


@pytest.mark.parametrize("dtype", SHORT)
def test_several_rounded_have_the_bits_of_each_alone(dtype, device):
    thetas = several((3, 1, 0, 7), 16, torch.float32, device)
    cores = kernel.cayley_each(thetas, 16, 4, dtype)
    expected = [alone.rounded(theta, 16, 4, dtype) for theta in thetas]
    assert all(map(torch.equal, cores, expected))
    assert torch.equal(kernel.cayley_joined(thetas, 16, 4, dtype), torch.cat(expected))
    grads = [torch.randn_like(core) for core in cores]
    each = [alone.rounded_grad(*pair, 16, 4) for pair in zip(grads, thetas, strict=True)]
    assert all(map(torch.equal, kernel.cayley_each_grad(grads, thetas, 16, 4, dtype), each))
    # In shares, in float32, of which the sum is rounded once.
    shares = [torch.stack([grad.float() / 2] * 2) for grad in grads]
    assert all(map(torch.equal, kernel.cayley_each_grad(shares, thetas, 16, 4, dtype), each))
