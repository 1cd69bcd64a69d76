"""Norms with their rotations on a CUDA device, at real sizes and in real models."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Qwen2Config

import oftfx
from oftfx import ops, testing
from oftfx.backend import oftfx as backend
from oftfx.ops.norm_rotate import Norm
from tests.ops.test_norm_rotate import KINDS, case, statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = "cuda:0"


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def on_gpu(kind, count, shape, b, dtype, x_dtype):
    """The op's operands for float16s as exact numbers; cores with the digits they are used with."""
    x, weight, bias, cores = case(kind, count, shape, b, torch.float64)
    x = x.to(CUDA, x_dtype)
    weight, bias = (None if t is None else t.to(CUDA, x_dtype) for t in (weight, bias))
    cores = [(core / b**0.5).to(CUDA, dtype).float() for core in cores]
    mean, rstd = statistics(kind, x)
    return x, Norm(mean, rstd, weight, bias), cores


def double(given):
    x, norm, cores = given
    wide = Norm(*(None if t is None else t.double() for t in norm))
    return x.double(), wide, [core.double() for core in cores]


HALVES = [(b, torch.bfloat16) for b in (8, 24, 32, 64, 128)]


@pytest.mark.parametrize(
    ("b", "dtype"), [*HALVES, (32, torch.float16), (32, torch.float32), (100, torch.float32)]
)
def test_values_and_gradients_are_those_of_float64(b, dtype):
    """Those that one kernel serves, and those that it does not."""
    eps = torch.finfo(dtype).eps
    for shape, count, kind, x_dtype in (
        ((4096, 3584 // b * b), 3, "rms", dtype),
        ((33, 5 * b), 1, "layer", torch.float32),
        ((1001, max(1, 576 // b) * b), 2, "layer", dtype),
        ((1001, 7 * b), 1, "rms without weight", dtype),
    ):
        given = on_gpu(kind, count, shape, b, dtype, x_dtype)
        grads = [torch.randn(shape, device=CUDA).to(dtype) for _ in range(count)]
        outs = ops.norm_rotate(*given, dtype)
        exact_outs = ops.norm_rotate(*double(given), torch.float64)
        for out, exact in zip(outs, exact_outs, strict=True):
            assert error(out, exact) < max(eps, 1e-6)
        needs = (True, False, True)
        *found, cores = ops.norm_rotate_grad(grads, *given, *needs)
        *exact, exact_cores = ops.norm_rotate_grad(
            [grad.double() for grad in grads], *double(given), *needs
        )
        for value, reference in zip((*found, *cores), (*exact, *exact_cores), strict=True):
            assert value.shape == reference.shape
            if value.numel():
                assert error(value, reference) < max(2 * eps, 5e-6)
        *again, cores_again = ops.norm_rotate_grad(grads, *given, *needs)
        for value, same in zip((*found, *cores), (*again, *cores_again), strict=True):
            assert torch.equal(value, same)


@pytest.mark.parametrize("b", [32, 64])
def test_gradients_of_one_rotations_readers_are_turned_back_together(b):
    x, norm, cores = on_gpu("rms", 1, (4096, 3584), b, torch.bfloat16, torch.bfloat16)
    grads = [torch.randn_like(x) for _ in range(3)]
    needs = (True, False, True)
    *found, (core,) = ops.norm_rotate_grad(grads, x, norm, cores, *needs)
    wide = [grad.double() for grad in grads]
    *exact, (exact_core,) = ops.norm_rotate_grad(wide, *double((x, norm, cores)), *needs)
    for value, reference in zip((*found, core), (*exact, exact_core), strict=True):
        if value.numel():
            assert error(value, reference) < 0.016


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    given = on_gpu(kind, 2, (33, 64), 32, torch.bfloat16, torch.bfloat16)
    x, norm, cores = given
    norm = [None if t is None else t.requires_grad_() for t in norm]
    wanted = [core.requires_grad_() for core in cores]
    op = torch.ops.oftfx.norm_rotate.default
    torch.library.opcheck(op, (x.requires_grad_(), wanted, torch.bfloat16, 1, *norm))


def test_offsets_beyond_32_bits():
    """Everything happens in the rows past 2³¹ elements."""
    b, width, tail = 32, 4096, 200
    rows = 2**31 // width + tail
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=CUDA)
    x[-tail:] = torch.randn(tail, width, device=CUDA)
    rstd = torch.rand(rows, 1, device=CUDA)
    cores = [(0.1 * torch.randn(width // b, b, b, device=CUDA)).bfloat16().float()]
    last = (x[-tail:], Norm(None, rstd[-tail:]), cores)
    (exact,) = ops.norm_rotate(*double(last), torch.float64)
    given = (x, Norm(None, rstd), cores)
    assert error(ops.norm_rotate(*given, torch.bfloat16)[0][-tail:], exact) < 8e-3
    needs = (True, False, True)
    grad_x, _, grad_rstd, _, _, grad_cores = ops.norm_rotate_grad([x], *given, *needs)
    exact_x, _, exact_rstd, _, _, exact_cores = ops.norm_rotate_grad(
        [x[-tail:].double()], *double(last), *needs
    )
    assert error(grad_x[-tail:], exact_x) < 8e-3
    assert error(grad_rstd[-tail:], exact_rstd) < 5e-6
    assert error(grad_cores[0], exact_cores[0]) < 8e-3
    assert not grad_x[:-tail].any()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_language_model_in_value_gradient_and_memory(autocast, fresh_compiler):
    config = Qwen2Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    dtype = torch.float32 if autocast else torch.bfloat16
    with torch.device(CUDA):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        ids = torch.randint(512, (2, 64))
    oftfx.adapt(model, oftfx.OFT(block_size=32))
    testing.randomize(model, std=0.02)
    exact = copy.deepcopy(model).double()

    def step(model, way):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast and way != "exact"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        grads = torch.autograd.grad(loss, list(oftfx.parameters(model)))
        return torch.cat([grad.double().flatten() for grad in (loss.detach(), *grads)])

    reference = step(exact, "exact")
    errors = {"eager": error(step(model, "eager"), reference)}
    for fused in (False, True):
        counters.clear()
        torch._dynamo.reset()
        options = {"fuse_norm": fused}
        compiled = torch.compile(model, backend=backend, options=options, fullgraph=True)
        errors[fused] = error(step(compiled, "compiled"), reference)
        assert counters["oftfx"]["fuse_norm"] == 4 * fused
    assert errors[True] < 1.2 * max(errors["eager"], errors[False])
    assert errors["eager"] < 0.1
