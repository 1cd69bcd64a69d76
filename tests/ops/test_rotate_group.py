"""`oftfx::rotate_group`: what each core alone would do, in value and every gradient."""

import pytest
import torch

from oftfx import ops

GROUP = torch.ops.oftfx.rotate_group.default
GROUP_GRAD = torch.ops.oftfx.rotate_group_grad.default


def case(count: int = 3, shape=(5, 12), b: int = 4, dtype=torch.float64):
    n = shape[-1] // b
    cores = [0.2 * torch.randn(n, b, b, dtype=dtype) for _ in range(count)]
    return torch.randn(shape, dtype=dtype), cores


def wanted(x, cores):
    return [value.clone().requires_grad_() for value in (x, *cores)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(count, dtype):
    x, cores = case(count, (2, 3, 8), dtype=dtype)
    x, *cores = wanted(x, cores)
    torch.library.opcheck(GROUP, (x, cores))
    grads = [torch.randn_like(x) for _ in cores]
    torch.library.opcheck(GROUP_GRAD, (grads, x, cores, True, True))


@pytest.mark.parametrize("shape", [(5, 12), (12,), (0, 8), (2, 3, 8)])
def test_is_each_rotation_in_value_and_gradient(shape):
    x, cores = case(3, shape)
    together, alone = wanted(x, cores), wanted(x, cores)
    outs = ops.rotate_group(together[0], together[1:])
    each = [ops.rotate(alone[0], core) for core in alone[1:]]
    for a, b in zip(outs, each, strict=True):
        assert torch.equal(a, b)
    grads = [torch.randn(shape, dtype=torch.float64) for _ in cores]
    torch.autograd.backward(outs, grads)
    torch.autograd.backward(each, grads)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_one_that_nobody_reads_gets_no_gradient():
    x, cores = case(2)
    x, *cores = wanted(x, cores)
    first, _ = ops.rotate_group(x, cores)
    first.sum().backward()
    assert not cores[1].grad.any()
    (alone,) = torch.autograd.grad(ops.rotate(x, cores[0]).sum(), x)
    torch.testing.assert_close(x.grad, alone)


@pytest.mark.parametrize("frozen", ["x", "cores"])
def test_only_what_is_wanted_is_computed(frozen):
    x, cores = case(2)
    if frozen == "x":
        cores = [core.requires_grad_() for core in cores]
    else:
        x.requires_grad_()
    sum(out.sum() for out in ops.rotate_group(x, cores)).backward()
    assert (x.grad is None) is (frozen == "x")
    assert all((core.grad is None) is (frozen == "cores") for core in cores)


def test_gradcheck_and_gradgradcheck():
    x, cores = case(2, (3, 8))
    leaves = wanted(x, cores)

    def run(x, *cores):
        return tuple(ops.rotate_group(x, list(cores)))

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_keeps_x_and_the_cores_alone():
    x, cores = case(3, (7, 12))
    x, *cores = wanted(x, cores)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.rotate_group(x, cores)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, *cores)}
    assert len(kept) == 4
