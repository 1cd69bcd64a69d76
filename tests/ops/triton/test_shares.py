"""The shares that runs find of a gradient, and the kernel that adds them as it reads them."""

import importlib

import pytest
import torch

from oftfx.ops.cayley_each import CAYLEY_EACH_GRAD
from oftfx.passes.sum_runs import sum_runs
from tests.passes.test_sum_runs import layer, traced

pytest.importorskip("triton")
FAMILIES = ("cayley_each", "glu_rotate", "norm_rotate", "rotate")
KERNELS = {name: importlib.import_module(f"oftfx.ops.triton.{name}") for name in FAMILIES}
tiles = importlib.import_module("oftfx.ops.triton.tiles")
cayley = KERNELS["cayley_each"]


@pytest.fixture(autouse=True)
def many(monkeypatch):
    """So many processors that the rows are cut into several runs."""
    monkeypatch.setattr(tiles, "processors", lambda device: 20)
    cuts = [module._work for module in KERNELS.values() if hasattr(module, "_work")]
    for cut in cuts:
        cut.cache_clear()
    yield
    for cut in cuts:
        cut.cache_clear()


def summed(shares: torch.Tensor) -> torch.Tensor:
    """In their order, in float32."""
    total = torch.zeros_like(shares[0])
    for share in shares:
        total += share
    return total


@pytest.mark.parametrize("b", [4, 7, 32, 64])
@pytest.mark.parametrize("order", [3, 4])
def test_are_added_in_their_order(b, order, device):
    """As many as wait together, fewer and more; one after another, and those of several cores."""
    counts = (3, 1, 0, 2, 5)
    thetas = [0.1 * torch.randn(n, b * (b - 1) // 2, device=device) for n in counts]
    joined = torch.randn(9, 2, 1, b, b, device=device)
    grads = [
        torch.randn(4, 3, b, b, device=device),
        joined[:, 1],
        torch.randn(2, 0, b, b, device=device),
        torch.randn(2, b, b, device=device),
        torch.randn(3, b, b, 5, device=device).permute(0, 3, 2, 1),
    ]
    whole = [summed(grad) if grad.dim() == 4 else grad for grad in grads]
    found = cayley.cayley_each_grad(grads, thetas, b, order)
    expected = cayley.cayley_each_grad(whole, thetas, b, order)
    assert all(map(torch.equal, found, expected))
    halves = [grad.half() for grad in grads]
    found = cayley.cayley_each_grad(halves, thetas, b, order)
    expected = cayley.cayley_each_grad([grad.float() for grad in halves], thetas, b, order)
    assert all(map(torch.equal, found, expected))


def operands(device):
    """As the pass's tests have them, of many rows and 16 bits."""
    x, *grads = torch.randn(5, 2, 300, 64, device=device).half().unbind()
    cores = list((0.1 * torch.randn(4, 2, 32, 32, device=device)).unbind())
    return x, grads, cores, [0.1 * torch.randn(2, 496, device=device) for _ in range(4)]


def test_handed_over_they_change_no_bit(device, monkeypatch):
    for name in (*FAMILIES, "cayley_each"):
        module = importlib.import_module(f"oftfx.ops.{name}")
        monkeypatch.setattr(module, "kernels", lambda family, device: KERNELS[family])
    given = operands(device)
    graph = traced(layer, given)
    expected = graph(*given)
    assert sum_runs(graph.graph) == 3
    graph.recompile()
    assert all(map(torch.equal, graph(*given), expected))
    # The compiler's idea of what there is, and what there is.
    (reader,) = graph.graph.find_nodes(op="call_function", target=CAYLEY_EACH_GRAD)
    assert all(grad.meta["val"].shape[0] > 1 for grad in reader.args[0])


@pytest.mark.parametrize("b", [256, 320])
def test_blocks_wider_than_any_program_holds_give_one(b, device):
    rotate = KERNELS["rotate"]
    grad, x = torch.randn(2, 40, b, device=device).half().unbind()
    core = 0.01 * torch.randn(1, b, b, device=device)
    grad_x, shares = rotate.shares(grad, x, core, True, True)
    assert len(shares) == rotate.runs(grad, x, core, True)
    expected_x, expected = rotate.rotate_grad(grad, x, core, True, True)
    assert torch.equal(grad_x, expected_x)
    assert torch.equal(summed(shares), expected)
