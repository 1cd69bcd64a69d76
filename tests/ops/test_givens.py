"""`oftfx::givens` and `oftfx::givens_grad`: schema, fake, autograd, memory and values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oftfx import ops
from oftfx.ops.factor import Factor
from oftfx.ops.givens import stages

GIVENS = torch.ops.oftfx.givens.default
GIVENS_GRAD = torch.ops.oftfx.givens_grad.default

# (shape of x, dtype of x, dtype of the core)
CASES = {
    "power of two": ((5, 8), torch.float64, torch.float64),
    "odd": ((2, 3, 7), torch.float32, torch.float32),
    "no rows": ((0, 6), torch.float32, torch.float32),
    "one pair": ((4, 2), torch.float32, torch.float32),
    "one coordinate": ((4, 1), torch.float32, torch.float32),
    "1-D": ((9,), torch.float32, torch.float32),
    "bf16": ((5, 12), torch.bfloat16, torch.float32),
    "wider core": ((5, 6), torch.float32, torch.float64),
}


def case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape, dtype, core_dtype = CASES[name]
    return torch.randn(shape).to(dtype), random_core(shape[-1], core_dtype)


def random_core(d: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (0.3 * torch.randn(d - 1, 2, 2)).to(dtype)


def pairs(d: int) -> list[list[tuple[int, int]]]:
    """The stages by the definition: i goes on when it is a multiple of the stage's stride."""
    alive, out = list(range(d)), []
    while len(alive) > 1:
        out.append(list(zip(alive[::2], alive[1::2], strict=False)))
        alive = alive[::2]
    return out


def dense(core: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """The product of the stages, each written out as one matrix."""
    d = core.shape[0] + 1
    matrix, blocks = torch.eye(d, dtype=core.dtype), iter(core)
    for stage in pairs(d):
        turn = torch.eye(d, dtype=core.dtype)
        for i, j in stage:
            where = torch.tensor([i, j])
            turn[where[:, None], where] += next(blocks)
        matrix = matrix @ turn
    return matrix.mT if transposed else matrix


@pytest.mark.parametrize("d", [1, 2, 3, 7, 8, 12, 17, 64, 100])
def test_stages_pair_every_coordinate_but_the_first_once(d):
    expected = pairs(d)
    found = [(step, blocks.stop - blocks.start) for step, blocks in stages(d)]
    assert found == [(2**s, len(stage)) for s, stage in enumerate(expected)]
    assert sum(count for _, count in found) == d - 1
    assert len(found) == math.ceil(math.log2(d))
    assert sorted(j for stage in expected for _, j in stage) == list(range(1, d))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(name, transposed):
    x, core = case(name)
    torch.library.opcheck(GIVENS, (x.requires_grad_(), core.requires_grad_(), transposed))


@pytest.mark.parametrize(
    "name",
    ["odd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("power of two", "no rows", "1-D"))],
)
@pytest.mark.parametrize("transposed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_opcheck_of_the_gradient(name, transposed):
    x, core = case(name)
    grad = torch.randn_like(x).requires_grad_()
    args = (grad, x.requires_grad_(), core.requires_grad_(), True, True, transposed)
    torch.library.opcheck(GIVENS_GRAD, args)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_opcheck_of_half_the_gradient(needed):
    # Without requires_grad: an output that is not needed is empty and takes part in no graph.
    x, core = case("odd")
    torch.library.opcheck(GIVENS_GRAD, (torch.randn_like(x), x, core, *needed))


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    d=st.integers(1, 20),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_is_the_product_of_its_stages(lead, d, transposed, seed):
    torch.manual_seed(seed)
    x, core = torch.randn(*lead, d, dtype=torch.float64), random_core(d)
    mapped = ops.givens(x, core, transposed)
    assert mapped.is_contiguous()
    torch.testing.assert_close(mapped, x @ dense(core, transposed), rtol=1e-12, atol=1e-12)
    factor = Factor(GIVENS, (core, transposed)).transposed()
    torch.testing.assert_close(factor(x), x @ dense(core, not transposed), rtol=1e-12, atol=1e-12)


@given(d=st.integers(1, 20), transposed=st.booleans(), seed=st.integers(0, 2**16))
def test_gradients_are_those_of_the_dense_product(d, transposed, seed):
    torch.manual_seed(seed)
    x, core = torch.randn(6, d, dtype=torch.float64), random_core(d)
    grad = torch.randn_like(x)
    x.requires_grad_(), core.requires_grad_()
    ours = torch.autograd.grad(ops.givens(x, core, transposed), (x, core), grad)
    reference = torch.autograd.grad(
        x @ dense(core, transposed), (x, core), grad, materialize_grads=True
    )
    torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_zero_core_is_the_identity_to_the_last_bit(dtype, transposed):
    info = torch.finfo(dtype)
    edges = [0.0, info.max, -info.max, info.tiny, info.smallest_normal / 2, 1 / 3]
    x = torch.cat([torch.tensor(edges, dtype=dtype), torch.randn(57).to(dtype)]).reshape(3, 21)
    assert torch.equal(ops.givens(x, torch.zeros(20, 2, 2), transposed), x)


def test_low_precision_is_rounded_once_a_stage():
    x, core = torch.randn(64, 256).bfloat16(), random_core(256, torch.float32)
    exact = x.double() @ dense(core.double())
    error = (ops.givens(x, core).double() - exact).norm() / exact.norm()
    assert error < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("frozen", [None, "x", "core"])
def test_gradcheck(transposed, frozen):
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=frozen != "x")
    core = random_core(7).requires_grad_(frozen != "core")
    assert torch.autograd.gradcheck(ops.givens, (x, core, transposed))
    assert torch.autograd.gradgradcheck(ops.givens, (x, core, transposed))


def test_gradients_have_the_dtypes_of_their_operands():
    x, core = case("bf16")
    ops.givens(x.requires_grad_(), core.requires_grad_()).sum().backward()
    assert (x.grad.dtype, core.grad.dtype) == (torch.bfloat16, torch.float32)


def test_keeps_its_operands_and_nothing_else():
    x, core = case("power of two")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda held: held):
        ops.givens(x.requires_grad_(), core.requires_grad_())
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), core.data_ptr()}


@pytest.mark.parametrize("shape", [(5, 7), (5, 9), (1,)])
def test_a_wrong_width_is_a_clear_error(shape):
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match=r"oftfx::givens: .*does not fit a core"):
            ops.givens(torch.zeros(shape, device=device), torch.zeros(7, 2, 2, device=device))
