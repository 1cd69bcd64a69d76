"""How long merging a 7B takes: the first time, with kernels to compile, and again.

    python benchmarks/merge.py --out benchmarks/results/merge-qwen2.5-7b-h100.json

On random weights. A merge is timed until the device is done with it, the model adapted anew before
each. The device's own time is a profile's of one more.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from measure import launched
from step import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM

import oftfx
from oftfx import testing
from oftfx.table import table


def adapted(model: nn.Module, block_size: int) -> nn.Module:
    testing.randomize(oftfx.adapt(model, oftfx.OFT(block_size=block_size)))
    torch.cuda.synchronize()
    return model


def milliseconds(model: nn.Module) -> float:
    begun = time.perf_counter()
    oftfx.merge(model)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON with every measurement and the setting")
    args = parser.parse_args()
    config = CONFIGS["qwen2.5-7b"]()
    config.num_hidden_layers = args.layers
    with torch.device("cuda"):
        dtype = getattr(torch, args.dtype)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    took = [milliseconds(adapted(model, args.block_size)) for _ in range(args.times)]
    adapted(model, args.block_size)
    profile = launched(lambda: oftfx.merge(model))
    first, *again = took
    line = (first, statistics.median(again), min(again), profile.milliseconds)
    headers = ("first ms", "again ms", "fastest", "device ms", "kernels")
    print(table(headers, [(*(f"{ms:.1f}" for ms in line), str(profile.kernels))]))
    setting = {
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "layers": args.layers,
        "dtype": args.dtype,
        "block_size": args.block_size,
    }
    result = {"setting": setting, "ms": took, "device_ms": profile.milliseconds}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
