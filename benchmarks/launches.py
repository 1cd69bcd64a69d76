"""The kernels beside what their bytes cost: rotations against a copy, cores, and launches.

Not called after kernels: bitsandbytes asks for a package of that name, and would find this file.

    python benchmarks/launches.py --out benchmarks/results/kernels-h100.json

Device times are medians of Triton's ``do_bench``, which empties the cache before each run, over
replays of a CUDA graph. ``copy`` reads and writes one activation; both gradients together move 1.5
times as much, and so are compared with 1.5 copies. A core's gradient alone reads two, and is
compared with a kernel that does nothing else. Launch costs are host time a site, in a chain of
many.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench

from oftfx import ops
from oftfx.table import table

SITES = 100


def microseconds(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()  # the host is slower than some of these kernels
    with torch.cuda.graph(graph):
        run()
    return 1e3 * float(do_bench(graph.replay, warmup=20, rep=100, return_mode="median"))


@triton.jit
def _read(x: tl.tensor, y: tl.tensor, out: tl.tensor, n: tl.tensor, SIZE: tl.constexpr) -> None:
    total = tl.full((SIZE,), 0.0, tl.float32)
    for i in tl.static_range(2):  # the fastest of 1, 2, 4 and 8 runs of 1024 to 4096
        at = (2 * tl.program_id(0).to(tl.int64) + i) * SIZE + tl.arange(0, SIZE)
        total += tl.load(x + at, at < n, 0.0).to(tl.float32)
        total += tl.load(y + at, at < n, 0.0).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(total))


def read(x: Tensor, y: Tensor) -> None:
    """Reads two tensors of one size, and next to nothing else."""
    size = 1024
    programs = triton.cdiv(x.numel(), 2 * size)
    out = torch.empty(programs, device="cuda")
    _read[(programs,)](x, y, out, x.numel(), size, num_warps=8)


def rotation(tokens: int, width: int, b: int, dtype: torch.dtype) -> dict[str, float]:
    grad, x = torch.randn(2, tokens, width, device="cuda").to(dtype).unbind()
    core = 0.1 * torch.randn(width // b, b, b, device="cuda")
    out = torch.empty_like(x)
    return {
        "copy": microseconds(lambda: out.copy_(x)),
        "read": microseconds(lambda: read(grad, x)),
        "rotate": microseconds(lambda: ops.rotate(x, core)),
        "both gradients": microseconds(lambda: ops.rotate_grad(grad, x, core, True, True)),
        "core gradient": microseconds(lambda: ops.rotate_grad(grad, x, core, False, True)),
    }


def group(count: int, tokens: int, width: int, b: int) -> dict[str, float]:
    """Rotations of one bfloat16 tensor, in one op and in one each, gradients added."""
    x, *grads = torch.randn(count + 1, tokens, width, device="cuda").bfloat16().unbind()
    cores = list((0.1 * torch.randn(count, width // b, b, b, device="cuda")).unbind())

    def apart() -> Tensor:
        pairs = zip(grads, cores, strict=True)
        first, *others = (ops.rotate_grad(grad, x, core, True, True)[0] for grad, core in pairs)
        for other in others:
            first += other
        return first

    return {
        "rotate": microseconds(lambda: ops.rotate_group(x, cores)),
        "rotate, one each": microseconds(lambda: [ops.rotate(x, core) for core in cores]),
        "gradients": microseconds(lambda: ops.rotate_group_grad(grads, x, cores, True, True)),
        "gradients, one each": microseconds(apart),
    }


def compiled_cores(count: int, width: int, b: int) -> Tensor:
    """As a compiled graph makes them where nothing but bfloat16 is turned: in that."""
    return (0.1 * torch.randn(count, width // b, b, b, device="cuda")).bfloat16()


def norm(count: int, tokens: int, width: int, b: int) -> dict[str, float]:
    """An RMSNorm, compiled, and its rotations in one op with it, its statistics given."""
    x, *grads = torch.randn(count + 1, tokens, width, device="cuda").bfloat16().unbind()
    weight = torch.randn(width, device="cuda").bfloat16()
    rstd = 0.5 + torch.rand(tokens, 1, device="cuda")
    cores = list(compiled_cores(count, width, b).unbind())
    norm = ops.Norm(None, rstd, weight)
    torch._dynamo.reset()  # else what is compiled for a second shape would be so for any

    @torch.compile
    def alone(x: Tensor) -> Tensor:
        h = x.float()
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    return {
        "norm": microseconds(lambda: alone(x)),
        "rotated": microseconds(lambda: ops.norm_rotate(x, norm, cores, x.dtype)),
        "one after the other": microseconds(lambda: ops.rotate_group(alone(x), cores)),
        "gradients": microseconds(
            lambda: ops.norm_rotate_grad(grads, x, norm, cores, True, False, True)
        ),
        "gradients of one rotation's readers": microseconds(
            lambda: ops.norm_rotate_grad(grads, x, norm, cores[:1], True, False, True)
        ),
    }


def product(tokens: int, width: int, b: int) -> dict[str, float]:
    """A gated product, compiled, and its rotation: in one op, and one after the other."""
    grad, gate, up = torch.randn(3, tokens, width, device="cuda").bfloat16().unbind()
    (core,) = compiled_cores(1, width, b)
    torch._dynamo.reset()

    @torch.compile
    def silu(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    @torch.compile
    def silu_grad(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        inner: Tensor = torch.ops.aten.silu_backward(grad * up, gate)
        return inner, grad * F.silu(gate)

    def apart() -> Tensor:
        inner, _ = ops.rotate_grad(grad, silu(gate, up), core, True, True)
        both: tuple[Tensor, Tensor] = silu_grad(inner, gate, up)
        return both[0]

    return {
        "product": microseconds(lambda: silu(gate, up)),
        "product and rotate": microseconds(lambda: ops.glu_rotate(gate, up, core, "silu")),
        "one after the other": microseconds(lambda: ops.rotate(silu(gate, up), core)),
        "product's gradients": microseconds(lambda: silu_grad(grad, gate, up)),
        "all gradients": microseconds(
            lambda: ops.glu_rotate_grad(grad, gate, up, core, "silu", True, True)
        ),
        "gradients, one after the other": microseconds(apart),
    }


def cores(blocks: int, b: int, order: int) -> dict[str, float]:
    theta = 0.02 * torch.randn(blocks, b * (b - 1) // 2, device="cuda")
    grad = torch.randn(blocks, b, b, device="cuda")
    return {
        "cores": microseconds(lambda: ops.cayley(theta, b, order)),
        "gradient": microseconds(lambda: ops.cayley_grad(grad, theta, b, order)),
    }


def launches() -> dict[str, float]:
    """Host microseconds a site of a chain of sites, SmolLM2's width, 2048 tokens."""
    x = torch.randn(2048, 576, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    thetas = [(0.02 * torch.randn(18, 496, device="cuda")).requires_grad_() for _ in range(SITES)]
    cores = [ops.cayley(theta, 32, 4).detach().requires_grad_() for theta in thetas]
    grad = torch.randn_like(x)

    def chain(operands: list[Tensor], site: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
        took = []
        for _ in range(12):
            torch.cuda.synchronize()
            start = time.perf_counter()
            out = x
            for operand in operands:
                out = site(out, operand)
            middle = time.perf_counter()
            torch.autograd.grad(out, [x, *operands], grad)
            took.append((middle - start, time.perf_counter() - middle))
        return [1e6 * statistics.median(part) / SITES for part in zip(*took[2:], strict=True)]

    rows = {
        "rotate": chain(cores, ops.rotate),
        "cores and rotate": chain(thetas, lambda x, theta: ops.rotate(x, ops.cayley(theta, 32, 4))),
        "an addition": chain([torch.ones_like(x).requires_grad_()] * SITES, torch.add),
    }
    return {
        f"{name}, {way}": value
        for name, values in rows.items()
        for way, value in zip(("forward", "backward"), values, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="JSON with every measurement and the setting")
    args = parser.parse_args()
    kinds = ("rotation", "group", "norm", "product", "cores", "launches")
    result: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in kinds}
    bf16, f32 = torch.bfloat16, torch.float32
    shapes = [(4096, 3584, b, bf16) for b in (8, 16, 32, 64, 128, 256)]
    shapes += [(4096, 18944, b, bf16) for b in (32, 64, 128, 256)]
    shapes += [(512, 3584, 32, bf16), (16384, 3584, 32, bf16), (4096, 3584, 32, f32)]
    lines = []
    for tokens, width, b, dtype in shapes:
        name = f"{tokens} × {width}, b={b}, {str(dtype).removeprefix('torch.')}"
        times = result["rotation"][name] = rotation(tokens, width, b, dtype)
        beside = {
            "rotate": times["copy"],
            "both gradients": 1.5 * times["copy"],
            "core gradient": times["read"],
        }
        moving = (f"{times[key]:.1f}" for key in ("copy", "read"))
        ratios = (f"{times[key]:.1f} ({times[key] / least:.2f})" for key, least in beside.items())
        lines.append((name, *moving, *ratios))
    header = ("tokens × width", "copy, µs", "reading two", *beside)
    print(table(header, lines))
    fused: list[tuple[str, str, dict[str, float]]] = []
    for count in (2, 3):
        name = f"{count} of one 4096 × 3584, b=32, bfloat16"
        fused.append(("group", name, group(count, 4096, 3584, 32)))
    for tokens in (512, 4096, 16384):
        for count in (1, 2, 3):
            name = f"RMSNorm and {count} of {tokens} × 3584, b=32, bfloat16"
            fused.append(("norm", name, norm(count, tokens, 3584, 32)))
        for width, b in ((18944, 32), (18944, 64), (18944, 128), (1536, 32)):
            name = f"SwiGLU of {tokens} × {width}, b={b}, bfloat16"
            fused.append(("product", name, product(tokens, width, b)))
    for kind, name, times in fused:
        result[kind][name] = times
        print(f"{name}: " + ", ".join(f"{key} {value:.1f} µs" for key, value in times.items()))
    # Every site of Qwen2.5-7B: six of width 3584 and one of 18944 in each of 28 layers.
    for b in (16, 32, 64):
        for order in (3, 4):
            blocks = 28 * (6 * 3584 + 18944) // b
            name = f"{blocks} blocks, b={b}, order {order}"
            times = result["cores"][name] = cores(blocks, b, order)
            print(f"{name}: {times['cores']:.0f} µs, gradient {times['gradient']:.0f} µs")
    result["launches"]["host µs a site"] = launches()
    for name, value in result["launches"]["host µs a site"].items():
        print(f"{name}: {value:.1f} µs")
    setting = {
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if args.out:
        args.out.write_text(json.dumps({"setting": setting, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
