"""`oftfx::rotate` and `oftfx::rotate_grad`: schema, fake, autograd, memory and values."""

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import oftfx
from oftfx import ops
from oftfx.ops.factor import Factor

ROTATE = torch.ops.oftfx.rotate.default
ROTATE_GRAD = torch.ops.oftfx.rotate_grad.default
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def random_core(n: int, b: int, dtype: torch.dtype = torch.float64, std: float = 0.1):
    return (std * torch.randn(n, b, b)).to(dtype)


def dense(core: torch.Tensor) -> torch.Tensor:
    """``blockdiag(I + C_i)`` as one matrix."""
    return torch.eye(core.shape[0] * core.shape[1], dtype=core.dtype) + torch.block_diag(*core)


# (shape of x, n, b, dtype of x, dtype of the core)
CASES = {
    "rows": ((5, 12), 3, 4, torch.float64, torch.float64),
    "one token": ((1, 1, 8), 2, 4, torch.float32, torch.float32),
    "no rows": ((0, 8), 2, 4, torch.float32, torch.float32),
    "1-D": ((8,), 4, 2, torch.float32, torch.float32),
    "4-D": ((2, 3, 2, 6), 2, 3, torch.float32, torch.float32),
    "odd n": ((4, 15), 3, 5, torch.float32, torch.float32),
    "one block": ((4, 7), 1, 7, torch.float32, torch.float32),
    "b=64": ((3, 128), 2, 64, torch.float32, torch.float32),
    "bf16": ((2, 5, 8), 2, 4, torch.bfloat16, torch.float32),
    "fp16": ((2, 5, 8), 2, 4, torch.float16, torch.float32),
    "bf16 core": ((5, 8), 2, 4, torch.bfloat16, torch.bfloat16),
    "wider core": ((5, 8), 2, 4, torch.float32, torch.float64),
}


def case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape, n, b, dtype, core_dtype = CASES[name]
    return torch.randn(shape).to(dtype), random_core(n, b, core_dtype)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    x, core = case(name)
    torch.library.opcheck(ROTATE, (x.requires_grad_(), core.requires_grad_()))


@pytest.mark.parametrize("name", ["rows", "one token", "no rows", "1-D", "4-D", "bf16"])
def test_opcheck_of_the_gradient(name):
    x, core = case(name)
    grad = torch.randn_like(x).requires_grad_()
    args = (grad, x.requires_grad_(), core.requires_grad_())
    torch.library.opcheck(ROTATE_GRAD, (*args, True, True))


def test_a_gradient_reaches_kernels_in_the_dtype_of_what_was_rotated(monkeypatch):
    seen = []

    def rotate_grad(grad, x, core, *_):
        seen.append(grad.dtype)
        return x, core

    served = SimpleNamespace(fits=lambda *_: True, rotate_grad=rotate_grad)
    monkeypatch.setattr(sys.modules[ops.rotate.__module__], "kernels", lambda *_: served)
    x, core = torch.randn(5, 8), random_core(2, 4, torch.float32)
    ops.rotate_grad(torch.randn(5, 8).double(), x, core, True, True)
    assert seen == [torch.float32]


def test_a_gradient_of_another_dtype_is_read_as_what_it_is():
    x, grad, core = torch.randn(70, 64), torch.randn(70, 64), random_core(2, 32, torch.float32)
    found = ops.rotate_grad(grad.double(), x, core, True, True)
    for value, wanted in zip(found, ops.rotate_grad(grad, x, core, True, True), strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize(("need_x", "need_core"), [(True, False), (False, True), (False, False)])
def test_opcheck_of_half_the_gradient(need_x, need_core):
    x, core = case("rows")
    # Without requires_grad: an output that is not needed is empty and takes part in no graph.
    torch.library.opcheck(ROTATE_GRAD, (torch.randn_like(x), x, core, need_x, need_core))


@pytest.mark.parametrize("make", ["x", "core", "x expanded", "core transposed"])
def test_opcheck_on_strided_operands(make):
    x, core = torch.randn(5, 12), random_core(3, 4, torch.float32)
    if make == "x":
        x = torch.randn(12, 5).T
    elif make == "x expanded":
        x = torch.randn(1, 12).expand(5, 12)
    elif make == "core":
        core = torch.randn(4, 4, 3).permute(2, 0, 1) * 0.1
    else:
        core = core.mT
    assert not (x.is_contiguous() and core.is_contiguous())
    torch.library.opcheck(ROTATE, (x.requires_grad_(), core.requires_grad_()))
    torch.testing.assert_close(ops.rotate(x, core), x @ dense(core))


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    n=st.integers(1, 5),
    b=st.integers(2, 9),
    seed=st.integers(0, 2**16),
)
def test_is_a_product_with_a_block_diagonal_matrix(lead, n, b, seed):
    torch.manual_seed(seed)
    x, core = torch.randn(*lead, n * b, dtype=torch.float64), random_core(n, b)
    rotated = ops.rotate(x, core)
    assert rotated.is_contiguous()
    torch.testing.assert_close(rotated, x @ dense(core), rtol=0, atol=1e-13)


@given(n=st.integers(1, 5), b=st.integers(2, 9), seed=st.integers(0, 2**16))
def test_gradients_are_those_of_the_dense_product(n, b, seed):
    torch.manual_seed(seed)
    x, core = torch.randn(6, n * b, dtype=torch.float64), random_core(n, b)
    grad = torch.randn_like(x)
    x.requires_grad_(), core.requires_grad_()
    ours = torch.autograd.grad(ops.rotate(x, core), (x, core), grad)
    reference = torch.autograd.grad(x @ dense(core), (x, core), grad)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("core_dtype", [torch.float32, torch.float64])
def test_a_zero_core_is_the_identity_to_the_last_bit(dtype, core_dtype):
    info = torch.finfo(dtype)
    edges = [0.0, info.max, -info.max, info.tiny, info.smallest_normal / 2, 1 / 3]
    x = torch.cat([torch.tensor(edges, dtype=dtype), torch.randn(58).to(dtype)]).reshape(2, 32)
    assert torch.equal(ops.rotate(x, torch.zeros(4, 8, 8, dtype=core_dtype)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_form_beats_a_rounded_rotation(dtype):
    """A small turn disappears in the rounding of R = I + C, and not in that of C."""
    x = torch.randn(256, 64).to(dtype)
    core = ops.cayley(0.002 * torch.randn(2, 496), 32, 4)
    change = x.double() @ dense(core.double()) - x.double()
    rounded_r = dense(core).to(dtype)
    plain = (x.double() @ rounded_r.double()) - x.double()
    residual = x.double() @ (dense(core.to(dtype).double())) - x.double()
    error_plain = float((plain - change).norm() / change.norm())
    error_residual = float((residual - change).norm() / change.norm())
    assert error_residual < error_plain / 3
    # And the op itself: as good as an exact product rounded once to x's dtype.
    best = ((x.double() + change).to(dtype).double() - x.double() - change).norm()
    ours = (ops.rotate(x, core).double() - x.double() - change).norm()
    naive = ((x @ rounded_r).double() - x.double() - change).norm()
    assert ours <= 1.1 * best
    assert ours < naive


@pytest.mark.parametrize("norm", [0.05, 0.3])
def test_a_stored_residual_is_more_orthogonal_than_a_stored_rotation(norm):
    core = ops.cayley(torch.randn(4, 496, dtype=torch.float64) * norm / (2 * 32**0.5), 32, None)
    eye = torch.eye(32, dtype=torch.float64)

    def defect(r: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(r.mT @ r - eye, ord=2).max())

    stored_r = (eye + core).bfloat16().double()
    stored_core = core.bfloat16().double() + eye
    assert defect(stored_core) < defect(stored_r) / 2


@pytest.mark.parametrize("shape", [(5, 11), (12, 5), (4,)])
def test_a_wrong_width_is_a_clear_error(shape):
    with pytest.raises(RuntimeError, match=r"does not fit a core.*last axis must be 3·4"):
        ops.rotate(torch.randn(shape), random_core(3, 4, torch.float32))
    with pytest.raises(RuntimeError, match=r"last axis must be 3·4"):
        ops.rotate(torch.randn(shape, device="meta"), torch.zeros(3, 4, 4, device="meta"))


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), ()])
def test_gradcheck(shape):
    x = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    core = random_core(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(ops.rotate, (x, core))
    assert torch.autograd.gradgradcheck(ops.rotate, (x, core))


@pytest.mark.parametrize("which", ["x", "core"])
def test_gradcheck_of_one_operand(which):
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=which == "x")
    core = random_core(2, 3).requires_grad_(which == "core")
    assert torch.autograd.gradcheck(ops.rotate, (x, core))
    assert torch.autograd.gradgradcheck(ops.rotate, (x, core))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_have_the_dtypes_of_their_operands(dtype):
    x = torch.randn(3, 8).to(dtype).requires_grad_()
    core = random_core(2, 4, torch.float32).requires_grad_()
    ops.rotate(x, core).sum().backward()
    assert x.grad.dtype == dtype
    assert core.grad.dtype == torch.float32


class Calls(TorchDispatchMode):
    """Records the arguments of every `rotate_grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is ROTATE_GRAD:
            self.masks.append(args[3:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("need_x", "need_core"), [(True, True), (False, True), (True, False)])
def test_only_the_gradients_that_are_needed_are_computed(need_x, need_core):
    x = torch.randn(3, 8, requires_grad=need_x)
    core = random_core(2, 4, torch.float32).requires_grad_(need_core)
    with Calls() as calls:
        ops.rotate(x, core).sum().backward()
    assert calls.masks == [(need_x, need_core)]
    assert (x.grad is not None, core.grad is not None) == (need_x, need_core)


def test_a_gradient_that_is_not_needed_is_empty():
    x, core = torch.randn(3, 8), random_core(2, 4, torch.float32)
    grad_x, grad_core = ops.rotate_grad(torch.randn(3, 8), x, core, False, False)
    assert grad_x.numel() == grad_core.numel() == 0


# --- distant blocks, and one block for all ---


def strided(core: torch.Tensor, stride: int) -> torch.Tensor:
    """The dense map whose blocks join runs of coordinates that lie ``stride`` runs apart."""
    n, b, _ = core.shape
    runs = torch.arange(n * b).view(-1, b // 2)
    firsts = [i for i in range(2 * n) if i // stride % 2 == 0]
    matrix = torch.eye(n * b, dtype=core.dtype)
    for block, first in zip(core, firsts, strict=True):
        where = torch.cat((runs[first], runs[first + stride]))
        matrix[where[:, None], where] += block
    return matrix


# n, b, stride
STRIDES = [(2, 2, 1), (2, 2, 2), (4, 2, 2), (4, 4, 4), (6, 4, 2), (12, 2, 4)]


@pytest.mark.parametrize(("n", "b", "stride"), STRIDES)
def test_a_stride_joins_distant_runs(n, b, stride):
    x, core = torch.randn(3, 2, n * b, dtype=torch.float64), random_core(n, b)
    torch.testing.assert_close(ops.rotate(x, core, stride), x @ strided(core, stride))
    assert ops.rotate(x, core, stride).is_contiguous()
    factor = Factor(ROTATE, (core, stride))
    torch.testing.assert_close(factor.transposed()(x), x @ strided(core, stride).mT)


@pytest.mark.parametrize(("n", "b", "stride"), STRIDES)
def test_gradcheck_with_a_stride(n, b, stride):
    x = torch.randn(2, n * b, dtype=torch.float64, requires_grad=True)
    core = random_core(n, b).requires_grad_()
    assert torch.autograd.gradcheck(ops.rotate, (x, core, stride))
    assert torch.autograd.gradgradcheck(ops.rotate, (x, core, stride), fast_mode=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_one_block_rotates_all(stride):
    x, core = torch.randn(3, 16, dtype=torch.float64), random_core(1, 4)
    x.requires_grad_(), core.requires_grad_()
    same = ops.rotate(x, core.expand(4, 4, 4), stride)
    torch.testing.assert_close(ops.rotate(x, core, stride), same)
    assert torch.autograd.gradcheck(ops.rotate, (x, core, stride))
    assert torch.autograd.gradgradcheck(ops.rotate, (x, core, stride), fast_mode=True)


@pytest.mark.parametrize(("blocks", "stride"), [(4, 2), (4, 4), (1, 2)])
def test_opcheck_with_a_stride_and_with_one_block(blocks, stride):
    x, core = torch.randn(5, 16).requires_grad_(), random_core(blocks, 4, torch.float32)
    core.requires_grad_()
    torch.library.opcheck(ROTATE, (x, core, stride))
    grad = torch.randn_like(x).requires_grad_()
    torch.library.opcheck(ROTATE_GRAD, (grad, x, core, True, True, stride))


@pytest.mark.parametrize(("n", "b", "stride"), [(3, 4, 2), (4, 3, 2), (4, 4, 8), (4, 4, 0)])
def test_a_stride_that_does_not_fit_is_a_clear_error(n, b, stride):
    with pytest.raises(RuntimeError, match=f"stride={stride}: the last axis must be {n}·{b}"):
        ops.rotate(torch.randn(2, n * b), random_core(n, b, torch.float32), stride)


# --- what a training step keeps ---


class Saved:
    """Every tensor that autograd keeps for the backward."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def __enter__(self) -> "Saved":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held)
        self._hooks.__enter__()
        return self

    def __exit__(self, *args) -> None:
        self._hooks.__exit__(*args)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors.append(tensor)
        return tensor

    def places(self) -> set[int]:
        return {tensor.data_ptr() for tensor in self.tensors}


@pytest.mark.parametrize("needs_x", [False, True])
def test_rotate_keeps_its_operands_and_nothing_else(needs_x):
    x = torch.randn(2, 7, 32, requires_grad=needs_x)
    core = random_core(4, 8, torch.float32).requires_grad_()
    with Saved() as saved:
        ops.rotate(x, core)
    assert saved.places() == {x.data_ptr(), core.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_an_adapted_linear_keeps_x_core_and_weight(dtype, bias):
    """With W frozen no rotated copy of x is kept; theta is a parameter and costs nothing."""
    model = nn.Sequential(nn.Linear(32, 24, bias=bias)).to(dtype)
    oftfx.adapt(model, oftfx.OFT(block_size=8), capture="modules")
    (theta,) = oftfx.parameters(model)
    x = torch.randn(2, 7, 32, dtype=dtype, requires_grad=True)
    with Saved() as saved:
        model(x)
    cores = [tensor for tensor in saved.tensors if tensor.shape == (4, 8, 8)]
    assert len({core.data_ptr() for core in cores}) == 1
    weight = model[0].weight
    expected = {x.data_ptr(), cores[0].data_ptr(), weight.data_ptr(), theta.data_ptr()}
    assert saved.places() == expected


def test_no_rows_are_turned_by_strided_blocks_too():
    core = torch.randn(2, 4, 4)
    assert ops.rotate(torch.randn(0, 8), core, 2).shape == (0, 8)
    grads = ops.rotate_grad(torch.randn(0, 8), torch.randn(0, 8), core, True, True, 2)
    assert [tuple(grad.shape) for grad in grads] == [(0, 8), (2, 4, 4)]
