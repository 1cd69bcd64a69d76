"""`oftfx::subspace` and `oftfx::subspace_grad`: schema, fake, autograd, memory and values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oftfx import ops
from oftfx.ops.factor import Factor

SUBSPACE = torch.ops.oftfx.subspace.default
SUBSPACE_GRAD = torch.ops.oftfx.subspace_grad.default

# (shape of x, r, dtype of x, dtype of support and kernel)
CASES = {
    "rows": ((5, 12), 3, torch.float64, torch.float64),
    "no rows": ((0, 8), 2, torch.float32, torch.float32),
    "1-D": ((8,), 4, torch.float32, torch.float32),
    "4-D": ((2, 3, 2, 6), 1, torch.float32, torch.float32),
    "whole space": ((4, 7), 7, torch.float32, torch.float32),
    "bf16": ((2, 5, 8), 3, torch.bfloat16, torch.float32),
    "bf16 operands": ((5, 8), 3, torch.bfloat16, torch.bfloat16),
    "wider operands": ((5, 8), 3, torch.float32, torch.float64),
}


def case(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape, r, dtype, held = CASES[name]
    support, kernel = torch.randn(r, shape[-1]), torch.randn(r, r)
    return torch.randn(shape).to(dtype), support.to(held), kernel.to(held)


def dense(support: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """``I + PᵀKP`` as one matrix."""
    return torch.eye(support.shape[1], dtype=support.dtype) + support.mT @ kernel @ support


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    operands = tuple(tensor.requires_grad_() for tensor in case(name))
    tolerance = 2e-2 if "bf16" in name else None
    torch.library.opcheck(SUBSPACE, operands, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["rows", "no rows", "1-D", "4-D"])
def test_opcheck_of_the_gradients(name):
    operands = tuple(tensor.requires_grad_() for tensor in case(name))
    grad = torch.randn_like(operands[0]).requires_grad_()
    torch.library.opcheck(SUBSPACE_GRAD, (grad, *operands, True, True, True))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False,) * 3])
def test_opcheck_of_some_gradients(needed):
    # Without requires_grad: an output that is not needed is empty and takes part in no graph.
    operands = case("rows")
    torch.library.opcheck(SUBSPACE_GRAD, (torch.randn_like(operands[0]), *operands, *needed))


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    d=st.integers(1, 9),
    r=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_is_a_product_with_the_dense_map(lead, d, r, seed):
    torch.manual_seed(seed)
    x, support, kernel = (
        torch.randn(*s, dtype=torch.float64) for s in ((*lead, d), (r, d), (r, r))
    )
    mapped = ops.subspace(x, support, kernel)
    assert mapped.is_contiguous()
    torch.testing.assert_close(mapped, x @ dense(support, kernel), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strided", ["x", "support", "kernel"])
def test_strided_operands(strided):
    operands = dict(zip(("x", "support", "kernel"), case("rows"), strict=True))
    operands[strided] = operands[strided].mT.contiguous().mT
    x, support, kernel = operands.values()
    torch.library.opcheck(SUBSPACE, tuple(t.requires_grad_() for t in operands.values()))
    torch.testing.assert_close(ops.subspace(x, support, kernel), x @ dense(support, kernel))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_zero_kernel_is_the_identity_to_the_last_bit(dtype):
    info = torch.finfo(dtype)
    # Not the largest number: x·Pᵀ would overflow, and 0·inf is no zero.
    edges = [0.0, info.tiny, info.smallest_normal / 2, 1 / 3]
    x = torch.cat([torch.tensor(edges, dtype=dtype), torch.randn(60).to(dtype)]).reshape(2, 32)
    assert torch.equal(ops.subspace(x, torch.randn(4, 32), torch.zeros(4, 4)), x)


@pytest.mark.parametrize("shape", [(2,), (1, 2), ()])
@pytest.mark.parametrize("frozen", [None, "x", "support", "kernel"])
def test_gradcheck(shape, frozen):
    shapes = {"x": (*shape, 4), "support": (2, 4), "kernel": (2, 2)}
    operands = tuple(
        torch.randn(size, dtype=torch.float64, requires_grad=name != frozen)
        for name, size in shapes.items()
    )
    assert torch.autograd.gradcheck(ops.subspace, operands)
    assert torch.autograd.gradgradcheck(ops.subspace, operands)


def test_gradients_have_the_dtypes_of_their_operands():
    operands = tuple(tensor.requires_grad_() for tensor in case("bf16"))
    ops.subspace(*operands).sum().backward()
    assert [t.grad.dtype for t in operands] == [torch.bfloat16, torch.float32, torch.float32]


def test_keeps_its_operands_and_nothing_else():
    operands = tuple(tensor.requires_grad_() for tensor in case("rows"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda held: held):
        ops.subspace(*operands)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in operands}


@pytest.mark.parametrize(
    ("support", "kernel"), [((3, 7), (3, 3)), ((3, 12), (3, 2)), ((3, 12), (4, 4))]
)
def test_shapes_that_do_not_fit_are_a_clear_error(support, kernel):
    for device in ("cpu", "meta"):
        shapes = ((5, 12), support, kernel)
        with pytest.raises(RuntimeError, match=r"oftfx::subspace: .*do not fit"):
            ops.subspace(*(torch.zeros(shape, device=device) for shape in shapes))


@given(d=st.integers(1, 8), r=st.integers(1, 10), seed=st.integers(0, 2**16))
def test_transpose_and_defect_are_those_of_the_dense_map(d, r, seed):
    torch.manual_seed(seed)
    support = torch.randn(r, d, dtype=torch.float64) / d**0.5
    kernel = torch.randn(r, r, dtype=torch.float64)
    factor, matrix = Factor(SUBSPACE, (support, kernel)), dense(support, kernel)
    x = torch.randn(3, d, dtype=torch.float64)
    torch.testing.assert_close(factor.transposed()(x), x @ matrix.mT)
    eye = torch.eye(d, dtype=torch.float64)
    measured = torch.linalg.matrix_norm(matrix.mT @ matrix - eye, ord=2)
    torch.testing.assert_close(factor.defect(), measured, rtol=1e-9, atol=1e-9)


def test_autocast_does_not_reach_inside():
    operands = case("1-D")
    expected = ops.subspace(*operands)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.subspace(*operands), expected)
