"""`oftfx::norm_rotate`: the norm, then each rotation, in value and every gradient."""

import pytest
import torch
from torch.nn import functional as F

from oftfx import ops
from oftfx.ops.norm_rotate import NORM_ROTATE, NORM_ROTATE_GRAD, Norm

KINDS = ["rms", "rms without weight", "layer", "layer without weight"]


def case(kind: str, count: int = 2, shape=(5, 12), b: int = 4, dtype=torch.float64):
    """x, weight and bias, and cores; of a norm that is not near its identity."""
    cores = [0.2 * torch.randn(shape[-1] // b, b, b, dtype=dtype) for _ in range(count)]
    x = torch.randn(shape, dtype=dtype) + 0.5
    weight = bias = None
    if not kind.endswith("without weight"):
        weight = 1 + 0.3 * torch.randn(shape[-1], dtype=dtype)
        bias = torch.randn(shape[-1], dtype=dtype) if kind == "layer" else None
    return x, weight, bias, cores


def statistics(kind: str, x):
    """As the graph pass writes them."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind.startswith("rms"):
        return None, torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    var, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    return mean, torch.rsqrt(var + 1e-5)


def fused(kind, x, weight, bias, cores):
    mean, rstd = statistics(kind, x)
    return ops.norm_rotate(x, Norm(mean, rstd, weight, bias), cores, x.dtype)


def apart(kind, x, weight, bias, cores):
    """PyTorch's own norm, and rotations written as PyTorch's matmuls."""
    width = x.shape[-1:]
    rms = kind.startswith("rms")
    y = F.rms_norm(x, width, weight, 1e-5) if rms else F.layer_norm(x, width, weight, bias, 1e-5)
    return [y + y @ torch.block_diag(*core) for core in cores]


def leaves(x, weight, bias, cores):
    return [t for t in (x, weight, bias, *cores) if t is not None]


def rebuilt(flat, weight, bias):
    x, *rest = flat
    weight = None if weight is None else rest.pop(0)
    bias = None if bias is None else rest.pop(0)
    return x, weight, bias, rest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:var_mean")  # of no rows
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 8), (12,), (0, 8)])
def test_is_the_norm_and_each_rotation_in_value_and_gradient(kind, shape):
    x, weight, bias, cores = case(kind, 3, shape)
    flat = [t.requires_grad_() for t in leaves(x, weight, bias, cores)]
    together = fused(kind, *rebuilt(flat, weight, bias))
    each = apart(kind, *rebuilt(flat, weight, bias))
    grads = [torch.randn_like(out) for out in each]
    for a, b in zip(together, each, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(outs, flat, grads) for outs in (together, each))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    x, weight, bias, cores = case(kind, 2, (3, 8))
    flat = [t.requires_grad_() for t in leaves(x, weight, bias, cores)]

    def run(*flat):
        return tuple(fused(kind, *rebuilt(flat, weight, bias)))

    assert torch.autograd.gradcheck(run, flat)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kind, dtype):
    x, weight, bias, cores = case(kind, 2, (2, 3, 8), dtype=dtype)
    mean, rstd = statistics(kind, x)
    norm = (mean, rstd, weight, bias)
    x_leaf, *inputs = [None if t is None else t.clone().requires_grad_() for t in (x, *norm)]
    wanted = [core.requires_grad_() for core in cores]
    for readers in (1, 2):
        torch.library.opcheck(NORM_ROTATE, (x_leaf, wanted, dtype, readers, *inputs))
    grads = [torch.randn_like(x) for _ in cores]
    given = (x, [core.detach() for core in cores])
    for needs in ((True, True, True), (True, False, True), (False, False, True)):
        torch.library.opcheck(NORM_ROTATE_GRAD, (grads, *given, *needs, *norm))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_readers_each_have_a_gradient_of_their_own(kind):
    """Which come to one, as if each had asked for the rotation itself."""
    x, weight, bias, cores = case(kind)
    flat = [t.requires_grad_() for t in leaves(x, weight, bias, cores)]
    mean, rstd = statistics(kind, x)
    norm = Norm(mean, rstd, weight, bias)
    outs = ops.norm_rotate(x, norm, cores, x.dtype, readers=2)
    once = ops.norm_rotate(x, norm, cores, x.dtype)
    together = [out for out in once for _ in range(2)]
    grads = [torch.randn_like(out) for out in outs]
    for a, b in zip(outs, together, strict=True):
        assert torch.equal(a, b)
    ours, theirs = (
        torch.autograd.grad(each, flat, grads, retain_graph=True) for each in (outs, together)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        assert len(ops.norm_rotate(x, norm, cores, x.dtype, readers=2)) == 4


def test_second_derivatives_are_refused():
    x, weight, bias, cores = case("rms")
    out, _ = fused("rms", x.requires_grad_(), weight, bias, cores)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_rounds_once_before_the_rotation(kind, dtype):
    """Zero cores leave the float32 norm, rounded; models' own norms are an ulp or two away."""
    x, weight, bias, cores = case(kind, 1, (50, 64), dtype=dtype)
    zeros = [torch.zeros_like(core) for core in cores]
    (out,) = fused(kind, x, weight, bias, zeros)
    wide = [None if t is None else t.float() for t in (x, weight, bias)]
    (exact,) = apart(kind, *wide, [core.float() for core in zeros])
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_the_residual_may_have_more_digits_than_the_rotation():
    """As under autocast: a float32 x, a bfloat16 rotation, a float32 gradient."""
    x, weight, bias, cores = case("rms", dtype=torch.float32)
    mean, rstd = statistics("rms", x)
    x.requires_grad_()
    (out, _) = ops.norm_rotate(x, Norm(mean, rstd, weight, bias), cores, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().sum(), x)
    assert grad.dtype == torch.float32


def test_a_frozen_norm_and_a_frozen_residual_cost_no_gradient():
    x, weight, bias, cores = case("layer")
    cores = [core.requires_grad_() for core in cores]
    outs = fused("layer", x, weight, bias, cores)
    sum(out.sum() for out in outs).backward()
    assert all(core.grad is not None for core in cores)
    assert x.grad is weight.grad is bias.grad is None


def test_keeps_the_residual_one_number_a_row_and_the_cores():
    x, weight, bias, cores = case("layer", 3, (7, 12))
    mean, rstd = statistics("layer", x)
    cores = [core.requires_grad_() for core in cores]
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.norm_rotate(x, Norm(mean, rstd, weight, bias), cores, x.dtype)
    given = [x, mean, rstd, weight, bias, *cores]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in given]


def test_autocast_does_not_reach_into_it():
    x, weight, bias, cores = case("layer", dtype=torch.float32)
    expected = fused("layer", x, weight, bias, cores)
    mean, rstd = statistics("layer", x)
    with torch.autocast("cpu", torch.bfloat16):
        outs = ops.norm_rotate(x, Norm(mean, rstd, weight, bias), cores, torch.float32)
    for out, value in zip(outs, expected, strict=True):
        assert torch.equal(out, value)


def test_refuses_another_width():
    x, weight, bias, cores = case("rms", shape=(5, 12))
    with pytest.raises(RuntimeError, match="does not fit"):
        fused("rms", x[:, :8], weight[:8], bias, cores)
