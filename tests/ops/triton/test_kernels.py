"""When Triton is used, and that its kernels compile."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from oftfx.ops.triton import kernels

CUDA = torch.device("cuda:0")
choose = kernels.__wrapped__  # without its cache


def test_old_gpus_and_gpus_of_others_stay_with_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose("rotate", CUDA) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert choose("rotate", CUDA) is None


def test_without_triton_pytorch_does_the_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose("rotate", CUDA) is None


def test_with_triton_its_kernels_do(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose("rotate", CUDA).__name__ == "oftfx.ops.triton.rotate"


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from oftfx.ops.triton import (
    add,
    cayley,
    cayley_each,
    dequantise,
    divide,
    givens,
    glu_rotate,
    norm_rotate,
    rotate,
    rotate_group,
    wide,
    wide_cayley,
)

cpu, f32, bf16 = torch.device("cpu"), torch.float32, torch.bfloat16

def check(launch, *tensors):
    kernel, numbers = launch._kernel, len(launch._kernel.arg_names) - len(tensors)
    names = kernel.arg_names[len(tensors):]
    values = dict(zip(names, launch._rest, strict=True))
    constants = {p.name for p in kernel.params if p.is_constexpr}
    # A number that is called an int has that type, and Triton does not ask if it is a stride of 1.
    assert not any(p.annotation_type for p in kernel.params)
    signature = dict(zip(kernel.arg_names, tensors))
    signature |= {name: "constexpr" if name in constants else "i32" for name in names}
    place = kernel.arg_names.index
    source = ASTSource(kernel, signature, {(place(n),): values[n] for n in constants})
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch._options)

for b, stride, dtype, name, product in (
    (32, 1, bf16, "*bf16", False),
    (32, 1, bf16, "*bf16", True),
    (4, 3, f32, "*fp32", False),
    (4, 1, f32, "*fp32", True),
    (33, 1, bf16, "*bf16", False),
    (16, 3, bf16, "*bf16", False),
):
    strides = (3 * b, 3 * b, 3 * b), (b * b, b, 1)
    work = rotate._work((99, 3, b, stride), dtype, f32, *strides, (True, True, product), cpu)
    check(work.launch, name, name, name, "*fp32", name, "*fp32")
for count in (2, 3):
    sizes, strides, name = (count, 99, 3, 32, bf16, f32, 96), (1024, 1, 32), "*bf16"
    work = rotate_group._work(*sizes, 0, strides, (), cpu)
    check(work.launch, name, *["*fp32"] * 3, *[name] * 3)
    work = rotate_group._work(*sizes, 96, strides, (True, True), cpu)
    check(work.launch, *[name] * 4, *["*fp32"] * 3, name, "*fp32")
for rotations, readers in ((3, 0), (1, 3)):
    dtypes = (bf16, bf16, f32, None, f32, bf16, None)
    problem = norm_rotate.Problem(99, 3, 32, rotations, 96, dtypes, cpu)
    name, strides = "*bf16", (1024, 1, 32)
    norm, cores = ["*fp32", "*fp32", "*bf16", "*fp32"], ["*fp32"] * 3
    work = norm_rotate._work(problem, 0, strides, 0, ())
    check(work.launch, name, *norm, *cores, *[name] * 3)
    work = norm_rotate._work(problem, 96, strides, readers, (True, True))
    check(work.launch, *[name] * 4, *norm, *cores, name, "*fp32", "*fp32")
for kind, b, dtype, name in (
    (("silu", True), 32, bf16, "*bf16"),
    (("gelu", True), 33, bf16, "*bf16"),
    (("gelu_tanh", False), 128, bf16, "*bf16"),
    (("relu", True), 64, f32, "*fp32"),
    (("relu2", False), 4, f32, "*fp32"),
):
    sizes, strides = (99, 3, b, dtype, f32), (b * b, b, 1)
    work = glu_rotate._work(*sizes, (6 * b, 6 * b), strides, kind, None, cpu)
    check(work.launch, name, name, "*fp32", name)
    work = glu_rotate._work(*sizes, (3 * b, 6 * b, 6 * b), strides, kind, (True, True), cpu)
    check(work.launch, *[name] * 3, "*fp32", name, name, "*fp32")
check(add._launch(3, 2, 64, f32, cpu), *["*fp32"] * 4)
for dtype, core in ((f32, "*fp32"), (bf16, "*bf16")):
    sizes = 5, 4, 3, dtype, f32, cpu
    check(cayley._launch(cayley._cayley, *sizes), "*fp32", core)
    check(cayley._launch(cayley._cayley_grad, *sizes), core, "*fp32", "*fp32")
    sizes = ((5, 0, 9), 4, 3, (dtype, f32, f32), cpu)
    check(cayley_each._launch(cayley_each._cayley_each, *sizes), *["*fp32"] * 8, *[core] * 8)
    runs = (4, 1, 9), (48, 0, 144)
    check(cayley_each._launch(cayley_each._cayley_each_grad, *sizes, runs), *["*fp32"] * 24)
work = wide._gram_work(99, 3, 130, (bf16, f32), (390, 390), 3, cpu)
check(work.launch, *["*bf16"] * 4, *["*fp32"] * 3)
check(wide._turn_work(99, 3, 130, bf16, (390, 130 * 130, 1, 130), 3, cpu), *["*bf16"] * 7)
for b, dtype, name in ((66, f32, "*fp32"), (66, bf16, "*bf16"), (128, bf16, "*bf16")):
    launch = wide_cayley._launch(3, b, ("turned", "+", 2, 1), dtype, cpu)
    check(launch, *[name] * 7)
    check(wide_cayley._passing(wide_cayley._pack, 3, b, (f32, dtype), cpu), name, "*fp32")
    check(wide_cayley._passing(wide_cayley._unpack, 3, b, (f32, dtype), cpu), "*fp32", name)
    mix = wide_cayley._passing(wide_cayley._mix, 3, b, (dtype, dtype), cpu, False, True)
    check(mix, *[name] * 5)
for b, nested, dtype, core, name in (
    (32, 256, bf16, f32, "*bf16"), (64, 0, f32, f32, "*fp32"), (32, 0, bf16, None, "*bf16")
):
    launch = dequantise._launch(99, 3584, b, 64, nested, dtype, core, (b * b, b, 1), cpu)
    scales = ["*u8" if nested else "*fp32", *["*fp32"] * 4]
    check(launch, "*u8", *scales, "*fp32" if core else name, name)
for level, dtype, name in zip(givens._levels(576), (bf16, f32), ("*bf16", "*fp32"), strict=True):
    launch = givens._forward_work(99, 576, level, 576, True, (dtype, f32, dtype), cpu)
    check(launch, name, "*fp32", name, "*fp32")
    dtypes = (dtype, dtype, f32, dtype)
    launch = givens._backward_work(99, 576, level, (576, 576), (True, True), dtypes, cpu)
    check(launch, name, name, "*fp32", name, "*fp32", "*fp32")
check(divide._launch(3, 16, f32, (256, 16, 1), cpu), "*fp32", "*fp32", "*fp32")
"""


def test_the_kernels_compile_for_a_gpu():
    """The interpreter takes Python that the compiler does not; this needs no GPU."""
    pytest.importorskip("triton")
    # Another process: this one interprets its kernels.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
