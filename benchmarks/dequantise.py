"""A 4-bit weight's way to bfloat16, turned or not, beside bitsandbytes' own.

    python benchmarks/dequantise.py --out benchmarks/results/dequantise-h100.json

Device times as in launches.py: medians of a replayed CUDA graph, the cache emptied before each run.
"""

import argparse
import json
from pathlib import Path

import bitsandbytes
import torch
import triton
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from launches import microseconds

from oftfx.ops.rotated_linear import dequantised, folded
from oftfx.sites.bitsandbytes import packed_of
from oftfx.table import table


def weight(out: int, width: int, double: bool) -> dict[str, float]:
    """Microseconds of each way, from NF4."""
    bf16 = torch.bfloat16
    given = torch.randn(out, width, device="cuda", dtype=bf16)
    data, state = quantize_4bit(given, compress_statistics=double, quant_type="nf4")
    packed = packed_of(data, state)
    times = {
        "bitsandbytes": microseconds(lambda: dequantize_4bit(data, state)),
        "alone": microseconds(lambda: dequantised(packed, bf16)),
    }
    for b in (16, 32, 64, 128):
        core = 0.1 * torch.randn(width // b, b, b, device="cuda")
        times[f"turned, b={b}"] = microseconds(lambda core=core: folded(packed, core, bf16))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="JSON with every measurement and the setting")
    args = parser.parse_args()
    result = {
        f"{out} × {width}, scales {'quantised' if double else 'plain'}": weight(out, width, double)
        for out, width in ((3584, 3584), (18944, 3584), (3584, 18944))
        for double in (False, True)
    }
    lines = [
        (
            name,
            *(
                f"{value:.1f}" if way == "bitsandbytes" else f"{value:.1f} ({value / base:.2f})"
                for base in [times["bitsandbytes"]]
                for way, value in times.items()
            ),
        )
        for name, times in result.items()
    ]
    print(table(("out × in", *next(iter(result.values()))), lines))
    setting = {
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }
    if args.out:
        args.out.write_text(json.dumps({"setting": setting, "µs": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
