"""The ops on a CUDA device, in every dtype and at real sizes: `make test-gpu`."""

import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import oftfx
from oftfx import ops
from oftfx.backend import oftfx as backend
from oftfx.ops.glu_rotate import ACTIVATIONS, served
from oftfx.ops.triton import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ROUNDING = {
    torch.bfloat16: 2.5e-3,
    torch.float16: 3e-4,
    torch.float32: 1e-6,
    torch.float64: 1e-13,
}
CUDA = "cuda:0"


def operands(rows: int, width: int, b: int, dtype: torch.dtype):
    grad, x = torch.randn(2, rows, width, device=CUDA).to(dtype).unbind()
    core = 0.3 / b**0.5 * torch.randn(width // b, b, b, device=CUDA)
    return grad, x, core.to(dtype).to(torch.promote_types(dtype, torch.float32))


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [2, 3, 4, 7, 8, 16, 24, 32, 48, 64, 96, 128, 160, 256, 300])
def test_values_and_gradients_are_those_of_float64(b, dtype):
    for rows, blocks in ((4096, 3584 // b), (1, 576 // b), (33, 5), (1001, max(1, 200 // b))):
        grad, x, core = operands(rows, max(1, blocks) * b, b, dtype)
        exact = ops.rotate(x.double(), core.double())
        exact_x, exact_core = ops.rotate_grad(grad.double(), x.double(), core.double(), True, True)
        x.requires_grad_(), core.requires_grad_()
        rotated = ops.rotate(x, core)
        grad_x, grad_core = torch.autograd.grad(rotated, (x, core), grad)
        assert error(rotated.detach(), exact) < ROUNDING[dtype]
        assert error(grad_x, exact_x) < ROUNDING[dtype]
        # A sum over thousands of rows, in float32 whatever x is, but for what PyTorch computes.
        if dtype is torch.float64 or b > 256:
            assert error(grad_core, exact_core) < 5 * ROUNDING[dtype]
        else:
            assert error(grad_core, exact_core) < 5e-6
        assert torch.equal(ops.rotate(x, torch.zeros_like(core)), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [2, 3, 4, 7, 8, 16, 24, 32, 48, 64, 96, 128, 160])
def test_gradients_of_a_rotated_product_are_those_of_float64(b, dtype):
    """Of the product as PyTorch rounds it, whether one kernel makes it or PyTorch does."""
    for rows, blocks in ((4096, 3584 // b), (1, 576 // b), (33, 5), (1001, max(1, 200 // b))):
        grad, up, core = operands(rows, max(1, blocks) * b, b, dtype)
        factors = [torch.randn_like(up), up]
        x = (factors[0] * factors[1]).double()
        exact_x, exact_core = ops.rotate_grad(grad.double(), x, core.double(), True, True)
        args = ([grad], factors, [core])
        grad_x, (grad_core,) = ops.rotate_product_grad(*args, True, True)
        assert error(grad_x, exact_x) < ROUNDING[dtype]
        bound = 5e-6 if dtype is not torch.float64 else 5 * ROUNDING[dtype]
        assert error(grad_core, exact_core) < bound
        _, (alone,) = ops.rotate_product_grad(*args, False, True)
        assert error(alone, exact_core) < bound
        again = ops.rotate_product_grad(*args, True, True)
        assert torch.equal(again[0], grad_x)
        assert torch.equal(again[1][0], grad_core)


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [2, 8, 16, 32, 64, 128])
def test_distant_blocks_and_their_gradients_are_those_of_float64(b, dtype, stride):
    for rows, blocks in ((4096, 32), (33, 3 * stride)):
        grad, x, core = operands(rows, blocks * b, b, dtype)
        exact = ops.rotate(x.double(), core.double(), stride)
        exact_x, exact_core = ops.rotate_grad(
            grad.double(), x.double(), core.double(), True, True, stride
        )
        assert error(ops.rotate(x, core, stride), exact) < ROUNDING[dtype]
        grad_x, grad_core = ops.rotate_grad(grad, x, core, True, True, stride)
        assert error(grad_x, exact_x) < ROUNDING[dtype]
        bound = 5e-6 if dtype is not torch.float64 else 5 * ROUNDING[dtype]
        assert error(grad_core, exact_core) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 100, 192, 576, 1536, 3584, 4096, 11008, 18944])
def test_givens_stages_and_their_gradients_are_those_of_float64(width, dtype):
    for rows, transposed in ((2048, False), (77, True)):
        grad, x = torch.randn(2, rows, width, device=CUDA).to(dtype).unbind()
        core = 0.1 * torch.randn(width - 1, 2, 2, device=CUDA)
        core = core.to(torch.promote_types(dtype, torch.float32))
        exact = ops.givens(x.double(), core.double(), transposed)
        args = (grad.double(), x.double(), core.double(), True, True, transposed)
        exact_x, exact_core = ops.givens_grad(*args)
        assert error(ops.givens(x, core, transposed), exact) < ROUNDING[dtype]
        grad_x, grad_core = ops.givens_grad(grad, x, core, True, True, transposed)
        assert error(grad_x, exact_x) < ROUNDING[dtype]
        # Sums of products with a matrix, and with heads, that are as exact as x.
        assert error(grad_core, exact_core) < max(ROUNDING[dtype], 5e-6)
        again = ops.givens_grad(grad, x, core, True, True, transposed)
        assert torch.equal(again[0], grad_x)
        assert torch.equal(again[1], grad_core)
        assert torch.equal(ops.givens(x, torch.zeros_like(core), transposed), x)


def test_givens_gradients_hold_little_besides_their_operands():
    """Two rows of heads, and the Grams of a few runs, instead of a copy of x for every stage."""
    grad, x = torch.randn(2, 4096, 4096, dtype=torch.bfloat16, device=CUDA).unbind()
    core = 0.1 * torch.randn(4095, 2, 2, device=CUDA)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grad_x, grad_core = ops.givens_grad(grad, x, core, True, True)
    extra = torch.cuda.max_memory_allocated() - before - grad_x.nbytes - grad_core.nbytes
    assert 0 < extra < 0.1 * x.nbytes


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [2, 7, 16, 24, 32, 64, 128])
def test_groups_and_their_gradients_are_those_of_float64(b, dtype, count):
    """Those that one kernel serves, and those that it does not."""
    for rows, blocks in ((4096, 3584 // b), (1, 576 // b), (33, 5), (1001, max(1, 200 // b))):
        given = [operands(rows, blocks * b, b, dtype) for _ in range(count)]
        x, grads, cores = given[0][1], [grad for grad, _, _ in given], [core for *_, core in given]
        exact = ops.rotate_group(x.double(), [core.double() for core in cores])
        exact_x, exact_cores = ops.rotate_group_grad(
            [grad.double() for grad in grads],
            x.double(),
            [core.double() for core in cores],
            True,
            True,
        )
        leaves = [leaf.requires_grad_() for leaf in (x, *cores)]
        outs = ops.rotate_group(x, cores)
        grad_x, *grad_cores = torch.autograd.grad(outs, leaves, grads)
        for out, value in zip(outs, exact, strict=True):
            assert error(out.detach(), value) < ROUNDING[dtype]
        # Of many gradients PyTorch rounds each, and each sum.
        rounded = 1 if count <= 3 and x.dtype.itemsize == 2 else 2
        assert error(grad_x, exact_x) < rounded * ROUNDING[dtype]
        for value, reference in zip(grad_cores, exact_cores, strict=True):
            if dtype is torch.float64:
                assert error(value, reference) < 5 * ROUNDING[dtype]
            else:
                assert error(value, reference) < 5e-6
        again = ops.rotate_group_grad(grads, x.detach(), [c.detach() for c in cores], True, True)
        assert torch.equal(again[0], grad_x)
        assert all(torch.equal(a, c) for a, c in zip(again[1], grad_cores, strict=True))
        zeros = [torch.zeros_like(core) for core in cores]
        assert all(torch.equal(out, x) for out in ops.rotate_group(x, zeros))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "activation"),
    [*((b, "silu") for b in (2, 7, 16, 24, 64, 128, 160)), *((32, name) for name in ACTIVATIONS)],
)
def test_gated_products_and_their_gradients_are_those_of_float64(b, dtype, activation):
    """Rounded after the activation, the product and the rotation."""
    for rows, blocks in ((4096, 3584 // b), (1, 576 // b), (33, 5), (1001, max(1, 200 // b))):
        grad, both, core = operands(rows, 2 * max(1, blocks) * b, b, dtype)
        gate, up = both.chunk(2, dim=-1)
        grad, core = grad[:, : gate.shape[-1]], core[: len(core) // 2]
        exact = ops.glu_rotate(gate.double(), up.double(), core.double(), activation)
        args = (grad.double(), gate.double(), up.double(), core.double(), activation, True, True)
        exact_grads = ops.glu_rotate_grad(*args)
        leaves = [leaf.detach().requires_grad_() for leaf in (gate, up, core)]
        out = ops.glu_rotate(*leaves, activation)
        grads = torch.autograd.grad(out, leaves, grad)
        for value, reference in zip((out, *grads), (exact, *exact_grads), strict=True):
            assert error(value.detach(), reference) < 3 * ROUNDING[dtype]
        again = ops.glu_rotate_grad(grad, gate, up, core, activation, True, True)
        assert all(torch.equal(one, other) for one, other in zip(grads, again, strict=True))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 8, None])
@pytest.mark.parametrize("b", [2, 3, 4, 8, 16, 31, 32, 48, 64, 128])
def test_cores_and_their_gradients_are_those_of_float64(b, order):
    for n in (1, 7, 1000):
        theta = 0.3 / b**0.5 * torch.randn(n, b * (b - 1) // 2, device=CUDA)
        grad = torch.randn(n, b, b, device=CUDA)
        exact = ops.cayley(theta.double(), b, order)
        exact_grad = ops.cayley_grad(grad.double(), theta.double(), b, order)
        theta.requires_grad_()
        core = ops.cayley(theta, b, order)
        # Gradients of a series, and wide cores, are products of bf16 parts.
        assert error(core.detach(), exact) < (2e-6 if b <= 64 or order is None else 1e-5)
        grad_theta = torch.autograd.grad(core, theta, grad)[0]
        assert error(grad_theta, exact_grad) < (2e-6 if order is None else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b", [3, 16, 32, 64, 66, 96, 128, 160, 256, 300])
def test_rounded_cores_and_gradients_lose_what_sixteen_bits_do(b, dtype):
    from oftfx.ops.triton import cayley

    for order in (1, 3, 4, 5):
        theta = 0.3 / b**0.5 * torch.randn(5, b * (b - 1) // 2, device=CUDA)
        grad = torch.randn(5, b, b, device=CUDA).to(dtype)
        exact = ops.cayley(theta.double(), b, order)
        rounded = cayley.rounded(theta, b, order, dtype)
        assert error(rounded, exact) < 2 * error(exact.to(dtype), exact)
        exact = ops.cayley_grad(grad.double(), theta.double(), b, order)
        assert error(cayley.rounded_grad(grad, theta, b, order), exact) < 2 * ROUNDING[dtype]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("b", [16, 32, 64, 128, 256])
def test_a_compiled_model_in_bfloat16_rounds_its_cores(b, count):
    def model(x, *thetas):
        for theta in thetas:
            x = ops.rotate(torch.tanh(x), ops.cayley(theta, b, 4))
        return x

    x = torch.randn(256, 2 * b, device=CUDA).bfloat16()
    thetas = [0.01 * torch.randn(2, b * (b - 1) // 2, device=CUDA) for _ in range(count)]
    thetas = [theta.requires_grad_() for theta in thetas]
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found, exact = (torch.autograd.grad(run(x, *thetas).sum(), thetas) for run in (compiled, model))
    for grad, exact_grad in zip(found, exact, strict=True):
        assert error(grad, exact_grad.double()) < 4 * ROUNDING[torch.bfloat16]
    assert counters["oftfx"]["round_cores"] == 1


def test_triton_serves_this_device():
    rotating = "rotate", "rotate_group", "rotate_product", "glu_rotate", "givens"
    for family in (*rotating, "cayley", "cayley_each"):
        assert kernels(family, torch.device(CUDA)) is not None
    core = torch.zeros(2, 32, 32, device=CUDA)
    for dtype, expected in zip(DTYPES, (True, True, False, False), strict=True):
        assert served(torch.zeros(64, dtype=dtype, device=CUDA), core, "silu") is expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    grad, x, core = operands(33, 96, 32, dtype)
    args = (x.requires_grad_(), core.requires_grad_())
    torch.library.opcheck(torch.ops.oftfx.rotate.default, args)
    for needs in itertools.product((True, False), repeat=2):
        torch.library.opcheck(
            torch.ops.oftfx.rotate_grad.default, (grad, x.detach(), core.detach(), *needs)
        )
    group = [core.detach().clone().requires_grad_() for _ in range(2)]
    torch.library.opcheck(torch.ops.oftfx.rotate_group.default, (x, group))
    for needs in itertools.product((True, False), repeat=2):
        torch.library.opcheck(
            torch.ops.oftfx.rotate_group_grad.default,
            ([grad, grad.clone()], x.detach(), [core.detach() for core in group], *needs),
        )
    torch.library.opcheck(
        torch.ops.oftfx.rotate_product_grad.default,
        ([grad], [x.detach(), grad.clone()], [core.detach()], True, True),
    )
    glu = (x.detach().requires_grad_(), grad.clone().requires_grad_(), args[1], "silu")
    torch.library.opcheck(torch.ops.oftfx.glu_rotate.default, glu)
    torch.library.opcheck(torch.ops.oftfx.glu_rotate_grad.default, (grad, *glu, True, True))
    theta = (0.02 * torch.randn(3, 496, device=CUDA)).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.oftfx.cayley.default, (theta, 32, 4))
    grad_core = torch.randn_like(core)
    torch.library.opcheck(
        torch.ops.oftfx.cayley_grad.default, (grad_core.detach(), theta.detach(), 32, 4)
    )


def test_gradcheck_of_the_second_order():
    """In float64, through the PyTorch path, which second derivatives share."""
    x = torch.randn(3, 8, dtype=torch.float64, device=CUDA, requires_grad=True)
    core = 0.1 * torch.randn(2, 4, 4, dtype=torch.float64, device=CUDA)
    assert torch.autograd.gradgradcheck(ops.rotate, (x, core.requires_grad_()))


def test_offsets_beyond_32_bits():
    """Everything happens in the rows past 2³¹ elements."""
    b, width, tail = 32, 4096, 200
    rows = 2**31 // width + tail
    core = 0.1 * torch.randn(width // b, b, b, device=CUDA)
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=CUDA)
    x[-tail:] = torch.randn(tail, width, device=CUDA)
    last = x[-tail:].double()
    exact = ops.rotate(last, core.bfloat16().double())
    assert error(ops.rotate(x, core)[-tail:], exact) < ROUNDING[torch.bfloat16]
    grad_x, grad_core = ops.rotate_grad(x, x, core, True, True)
    exact_x, exact_core = ops.rotate_grad(last, last, core.bfloat16().double(), True, True)
    assert error(grad_x[-tail:], exact_x) < ROUNDING[torch.bfloat16]
    assert error(grad_core, exact_core) < 1e-6
    assert not grad_x[:-tail].any()
    del grad_x
    out, _ = ops.rotate_group(x, [core, core.mT])
    assert error(out[-tail:], exact) < ROUNDING[torch.bfloat16]
    del out, _
    args, exact_args = (x, x, core, "silu"), (last, last, core.bfloat16().double(), "silu")
    out = ops.glu_rotate(*args)[-tail:]
    assert error(out, ops.glu_rotate(*exact_args)) < 3 * ROUNDING[torch.bfloat16]
    grads = ops.glu_rotate_grad(x, *args, True, True)
    exacts = ops.glu_rotate_grad(last, *exact_args, True, True)
    for value, reference in zip(grads, exacts, strict=True):
        assert error(value[-tail:], reference[-tail:]) < 3 * ROUNDING[torch.bfloat16]
    del out, grads
    grad_x, (grad_core,) = ops.rotate_product_grad([x], [x, x], [core], True, True)
    square = (x[-tail:] * x[-tail:]).double()
    exact = ops.rotate_grad(last, square, core.bfloat16().double(), False, True)[1]
    assert error(grad_x[-tail:], exact_x) < ROUNDING[torch.bfloat16]
    assert error(grad_core, exact) < 1e-6
    del grad_x
    grad_x, grad_cores = ops.rotate_group_grad([x, x], x, [core, core], True, True)
    assert error(grad_x[-tail:], 2 * exact_x) < ROUNDING[torch.bfloat16]
    assert all(error(grad_core, exact_core) < 1e-6 for grad_core in grad_cores)


def test_the_same_input_gives_the_same_bits():
    grad, x, core = operands(4096, 3584, 32, torch.bfloat16)
    first = ops.rotate_grad(grad, x, core, True, True)
    for _ in range(3):
        again = ops.rotate_grad(grad, x, core, True, True)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapted_model_compiles_to_what_it_computes(dtype, fresh_compiler):
    with torch.device(CUDA):
        model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).to(dtype)
        x = torch.randn(40, 64, dtype=dtype)
    oftfx.adapt(model, oftfx.OFT(block_size=32), capture="modules")
    with torch.no_grad():
        for theta in oftfx.parameters(model):
            theta.normal_(std=0.02)

    def step(model: nn.Module) -> list[torch.Tensor]:
        loss = model(x).float().square().mean()
        return [loss, *torch.autograd.grad(loss, list(oftfx.parameters(model)))]

    eager = step(model)
    compiled = torch.compile(model, fullgraph=True)
    rounding = 2e-2 if dtype is torch.bfloat16 else 1e-4
    for value, expected in zip(step(compiled), eager, strict=True):
        assert error(value.detach(), expected.detach().double()) < rounding


def test_cuda_graphs_replay_the_kernels():
    grad, x, core = operands(300, 96, 32, torch.bfloat16)
    ops.rotate(x, core), ops.rotate_grad(grad, x, core, True, True)  # compiled before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotated = ops.rotate(x, core)
        grads = ops.rotate_grad(grad, x, core, True, True)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(rotated, ops.rotate(x, core))
    for value, expected in zip(grads, ops.rotate_grad(grad, x, core, True, True), strict=True):
        assert torch.equal(value, expected)
