"""`oftfx::glu_rotate`: what its parts would do, in value and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from oftfx import ops
from oftfx.ops.glu_rotate import ACTIVATIONS, served
from oftfx.ops.native.binding import library

GLU = torch.ops.oftfx.glu_rotate.default
GLU_GRAD = torch.ops.oftfx.glu_rotate_grad.default
FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}


def case(shape=(5, 12), b: int = 4, dtype=torch.float64, gated: bool = True):
    gate, up = torch.randn(2, *shape, dtype=dtype).unbind()
    core = 0.2 * torch.randn(shape[-1] // b, b, b, dtype=dtype)
    return gate, up if gated else None, core


def wanted(*tensors):
    return [t if t is None else t.detach().clone().requires_grad_() for t in tensors]


def parts(gate, up, core, activation):
    value = FUNCTIONS[activation](gate)
    return ops.rotate(value if up is None else value * up, core)


def test_a_gradient_of_another_dtype_is_read_as_what_it_is():
    gate, up, grad = torch.randn(3, 70, 64).unbind()
    rest = gate, up, 0.1 * torch.randn(2, 32, 32), "silu", True, True
    found = ops.glu_rotate_grad(grad.double(), *rest)
    for value, wanted in zip(found, ops.glu_rotate_grad(grad, *rest), strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize(
    ("activation", "gated", "dtype"),
    [("silu", True, torch.float32), ("gelu_tanh", False, torch.bfloat16)],
)
def test_opcheck(activation, gated, dtype):
    operands = wanted(*case((2, 3, 8), dtype=dtype, gated=gated))
    torch.library.opcheck(GLU, (*operands, activation))
    torch.library.opcheck(GLU_GRAD, (operands[0].detach(), *operands, activation, True, True))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("gated", [True, False])
def test_fakes_are_shaped_like_the_gradients(gated, needs):
    operands = case((2, 3, 8), gated=gated)
    torch.library.opcheck(
        GLU_GRAD, (operands[0], *operands, "silu", *needs), test_utils="test_faketensor"
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(
    shape=st.sampled_from([(5, 12), (12,), (0, 8), (2, 3, 8)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_is_its_parts_to_the_last_bit(activation, gated, shape, dtype):
    operands = wanted(*case(shape, dtype=dtype, gated=gated))
    expected = parts(*operands, activation)
    assert torch.equal(ops.glu_rotate(*operands, activation), expected)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_plain_autograd(activation, gated):
    operands, alone = wanted(*case(gated=gated)), wanted(*case(gated=gated))
    for one, other in zip(operands, alone, strict=True):
        if one is not None:
            other.data.copy_(one.data)
    gate, up, core = alone
    value = FUNCTIONS[activation](gate) if up is None else FUNCTIONS[activation](gate) * up
    matrix = torch.eye(12, dtype=torch.float64) + torch.block_diag(*core)
    grad = torch.randn(5, 12, dtype=torch.float64)
    (value @ matrix).backward(grad)
    ops.glu_rotate(*operands, activation).backward(grad)
    for one, other in zip(operands, alone, strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gradgradcheck(activation, gated):
    gate, up, core = wanted(*case((3, 4), b=2, gated=gated))
    leaves = (gate, core) if up is None else (gate, up, core)

    def run(gate, *rest):
        up, core = rest if gated else (None, *rest)
        return ops.glu_rotate(gate, up, core, activation)

    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("frozen", [{"gate", "up"}, {"core"}, {"up", "core"}, {"gate", "core"}])
def test_only_what_is_wanted_is_computed(frozen):
    named = dict(zip(("gate", "up", "core"), case(), strict=True))
    for name, tensor in named.items():
        tensor.requires_grad_(name not in frozen)
    ops.glu_rotate(*named.values(), "silu").sum().backward()
    assert {name for name, tensor in named.items() if tensor.grad is None} == frozen


def test_gate_and_up_may_be_halves_of_one_tensor():
    both = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    _, _, core = case()
    gate, up = both.chunk(2, dim=-1)
    out = ops.glu_rotate(gate, up, core, "silu")
    (grad,) = torch.autograd.grad(out.sum(), both)
    (expected,) = torch.autograd.grad(parts(gate, up, core, "silu").sum(), both)
    torch.testing.assert_close(grad, expected)


def test_keeps_gate_up_and_core_alone():
    gate, up, core = wanted(*case())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.glu_rotate(gate, up, core, "silu")
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (gate, up, core)]


def test_what_does_not_fit_is_refused():
    gate, up, core = case()
    with pytest.raises(RuntimeError, match=r"up is \(5, 8\).* and gate \(5, 12\)"):
        ops.glu_rotate(gate, up[:, :8], core, "silu")
    with pytest.raises(RuntimeError, match="oftfx::rotate"):
        ops.glu_rotate(gate, up, core[:2], "silu")
    with pytest.raises(KeyError, match="softplus"):
        ops.glu_rotate(gate, up, core, "softplus")


def test_a_cpu_serves_float32_in_blocks_of_whole_vectors():
    for dtype, b, activation, expected in (
        (torch.float32, 16, "silu", library() is not None),
        (torch.float32, 16, "relu2", False),
        (torch.float32, 4, "silu", False),
        (torch.bfloat16, 16, "silu", False),
    ):
        gate, core = torch.ones(3, 32, dtype=dtype), torch.zeros(32 // b, b, b)
        assert served(gate, core, activation) == expected
