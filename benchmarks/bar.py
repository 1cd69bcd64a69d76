"""Everything that is promised of speed, beside its limit: one command, one table.

    python benchmarks/bar.py                     # measures what this machine can (GPU: 15 minutes)
    python benchmarks/bar.py --only eager merge  # some of it
    python benchmarks/bar.py --show              # the table of what was measured before

Each measurement is a process of its own and leaves a file, with its setting, in `results/bar/`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from oftfx.table import table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "bar"

BASE, OWN, SHARED = "frozen base", "oftfx OFT b32", "oftfx OFT b32, shared"
PEFT_OFT, PEFT_LORA = "PEFT OFT b32", "PEFT LoRA r16"
SEVEN = ("step.py", "--model", "qwen2.5-7b", "--dtype", "bfloat16", "--device", "cuda")
ROWS, ALL_ROWS = ("--rows", BASE, OWN), ("--rows", BASE, OWN, SHARED)
PLAIN, LONG = ("--batch", "4", "--tokens", "1024"), ("--batch", "4", "--tokens", "4096")
LAYERS, WHOLE, NF4 = ("--compile", "layers"), ("--compile", "whole"), ("--quant", "nf4")
GRAPHS = ("--tokens", "512", "--mode", "reduce-overhead", "--steps", "60")

ON_CPU = {
    "cpu": ("step.py", "--tokens", "512"),
    "cpu-compiled": ("step.py", "--tokens", "512", *LAYERS),
}
ON_GPU = {
    "eager": (*SEVEN, *PLAIN, *ALL_ROWS),
    "compiled": (*SEVEN, *PLAIN, *LAYERS, *ALL_ROWS),
    "nf4": (*SEVEN, *PLAIN, *NF4, *ROWS),
    "nf4-compiled": (*SEVEN, *PLAIN, *NF4, *LAYERS, *ROWS),
    "512-tokens": (*SEVEN, *GRAPHS, *LAYERS, *ROWS),
    "512-tokens-whole": (*SEVEN, *GRAPHS, *WHOLE, *ROWS),
    "16384-tokens": (*SEVEN, *LONG, "--layers", "8", *LAYERS, *ROWS),
    "small": ("step.py", "--batch", "8", "--tokens", "256", "--autocast", "--device", "cuda"),
    "merge": ("merge.py",),
    "optimizer": ("optimizer.py",),
    "kernels": ("launches.py",),
    "dequantise": ("dequantise.py",),
}


class Promise(NamedTuple):
    """One line of the table.

    Attributes:
        what: What is promised.
        file: The measurement that tells.
        value: Reads it off that measurement's JSON.
        limit: What it may be at most.
        goal: What it should be, where that is less.
    """

    what: str
    file: str
    value: Callable[[Any], float]
    limit: float
    goal: float | None = None


def times(row: str, beside: str = BASE) -> Callable[[Any], float]:
    """A row's median step over another's."""
    return lambda read: _median(read["seconds"][row]) / _median(read["seconds"][beside])


def more(row: str) -> Callable[[Any], float]:
    """GiB that a row's peak is above the base's."""
    return lambda read: float(read["peak_gib"][row] - read["peak_gib"][BASE])


def kernel(part: str, case: str, one: str, beside: str) -> Callable[[Any], float]:
    """A kernel's time over that of what it is compared with."""
    return lambda read: float(read[part][case][one] / read[part][case][beside])


def _median(values: list[float]) -> float:
    return statistics.median(values)


PROMISES = [
    Promise("7B, bf16: step × frozen", "eager", times(OWN), 1.09, 1.05),
    Promise("  GiB more", "eager", more(OWN), 6.5),
    Promise("7B, bf16, compiled: step × frozen", "compiled", times(OWN), 1.05, 1.03),
    Promise("  GiB more", "compiled", more(OWN), 1.0, 0.7),
    Promise("  with shared rotations", "compiled", times(SHARED), 1.04, 1.02),
    Promise("  seconds to compile", "compiled", lambda read: read["first_seconds"][OWN], 30, 15),
    Promise("7B, NF4: step × frozen", "nf4", times(OWN), 1.05, 1.03),
    Promise("7B, NF4, compiled: step × frozen", "nf4-compiled", times(OWN), 1.04, 1.02),
    Promise("  GiB more", "nf4-compiled", more(OWN), 1.0),
    Promise("7B, 512 tokens, CUDA graphs, layers", "512-tokens", times(OWN), 1.10, 1.05),
    Promise("  as a whole", "512-tokens-whole", times(OWN), 1.10, 1.05),
    Promise("7B, 16,384 tokens, compiled", "16384-tokens", times(OWN), 1.05, 1.02),
    Promise(
        "SmolLM2-135M, autocast: seconds", "small", lambda read: _median(read["seconds"][OWN]), 0.17
    ),
    Promise("  × PEFT LoRA r16", "small", times(OWN, PEFT_LORA), 0.81),
    Promise("  × PEFT OFT", "small", times(OWN, PEFT_OFT), 0.41),
    Promise("SmolLM2-135M, two CPU cores: step × frozen", "cpu", times(OWN), 1.03),
    Promise("  × PEFT OFT", "cpu", times(OWN, PEFT_OFT), 1.0),
    Promise("  compiled: step × frozen", "cpu-compiled", times(OWN), 1.03),
    Promise("  compiled: × PEFT OFT", "cpu-compiled", times(OWN, PEFT_OFT), 1.0),
    Promise("merge of the 7B, ms", "merge", lambda read: _median(read["ms"][1:]), 100, 50),
    Promise(
        "AdamW over the 7B's rotations, ms",
        "optimizer",
        lambda read: _median(read["ms"]["fused"]["update, with"]),
        1.0,
    ),
    Promise(
        "rotation × copy, 4096 × 3584",
        "kernels",
        kernel("rotation", "4096 × 3584, b=32, bfloat16", "rotate", "copy"),
        1.10,
    ),
    Promise(
        "  4096 × 18944",
        "kernels",
        kernel("rotation", "4096 × 18944, b=32, bfloat16", "rotate", "copy"),
        1.10,
    ),
    Promise(
        "norm and rotation × norm",
        "kernels",
        kernel("norm", "RMSNorm and 1 of 4096 × 3584, b=32, bfloat16", "rotated", "norm"),
        1.05,
    ),
    Promise(
        "SwiGLU and rotation × SwiGLU",
        "kernels",
        kernel(
            "product", "SwiGLU of 4096 × 18944, b=32, bfloat16", "product and rotate", "product"
        ),
        1.05,
    ),
    Promise(
        "gradient of the core × reading both",
        "kernels",
        kernel("rotation", "4096 × 3584, b=32, bfloat16", "core gradient", "read"),
        1.15,
    ),
    Promise(
        "cores of the 7B, ms",
        "kernels",
        lambda read: read["cores"]["35392 blocks, b=32, order 3"]["cores"] / 1000,
        0.3,
    ),
    Promise(
        "NF4 dequantised and turned × bitsandbytes",
        "dequantise",
        lambda read: max(
            case["turned, b=32"] / case["bitsandbytes"] for case in read["µs"].values()
        ),
        1.10,
    ),
]


def shown(results: Path) -> str:
    """The table of what was measured."""
    lines = []
    for promise in PROMISES:
        path = results / f"{promise.file}.json"
        found = promise.value(json.loads(path.read_text())) if path.exists() else None
        goal = "" if promise.goal is None else f"{promise.goal:g}"
        if found is None:
            held, value = "not measured", ""
        else:
            held, value = "yes" if found <= promise.limit else "no", f"{found:.3f}"
        lines.append((promise.what, value, f"{promise.limit:g}", goal, held))
    header = ("what", "measured", "limit", "goal", "held")
    return table(header, lines, right="measured limit goal")


def main() -> None:
    known = {**ON_GPU, **ON_CPU}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--only", nargs="+", choices=known, help="else all that this machine can")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the measurements are")
    args = parser.parse_args()
    chosen = args.only or (known if torch.cuda.is_available() else ON_CPU)
    failed = []
    for name in () if args.show else chosen:
        args.results.mkdir(parents=True, exist_ok=True)
        script, *options = known[name]
        out = args.results / f"{name}.json"
        print(f"{name}: {script}", file=sys.stderr)
        done = subprocess.run([sys.executable, HERE / script, *options, "--out", out])
        failed += [name] if done.returncode else []
    print(shown(args.results))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their lines, if any, are of an earlier run")


if __name__ == "__main__":
    main()
