"""What AdamW adds to a training step of a 7B whose host runs ahead of the device.

    python benchmarks/optimizer.py --out benchmarks/results/optimizer-qwen2.5-7b-h100.json

Steps of 4 × 1024 tokens, compiled layer by layer, one after the other without waiting, every other
one with an update. The device's own events, right after the backward and right after the update,
tell what lies between: the update, and whatever the device waits for it.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from measure import compiled
from step import CONFIGS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import oftfx
from oftfx.table import table

WAYS = {"fused": {"fused": True}, "foreach": {"foreach": True}}
WARM = 5


def measure(
    model: nn.Module, tokens: Tensor, optimizer: torch.optim.Optimizer, steps: int
) -> dict[str, list[float]]:
    """Milliseconds from the backward's end on, and of whole steps, each with and without."""
    marks: list[list[torch.cuda.Event]] = []
    for step in range(WARM + steps):
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        begin.record()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        middle.record()
        if step < WARM or step % 2:
            optimizer.step()
        end.record()
        optimizer.zero_grad()
        marks.append([begin, middle, end])
    torch.cuda.synchronize()
    took: dict[str, list[float]] = {}
    for step in range(WARM, len(marks) - 1):
        way = "with" if step % 2 else "without"
        (begin, middle, end), (following, *_) = marks[step], marks[step + 1]
        took.setdefault(f"update, {way}", []).append(middle.elapsed_time(end))
        took.setdefault(f"step, {way}", []).append(begin.elapsed_time(following))
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="JSON with every measurement and the setting")
    args = parser.parse_args()
    config = CONFIGS["qwen2.5-7b"]()
    config.num_hidden_layers = args.layers
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tokens = torch.randint(config.vocab_size, (4, 1024))
    compiled(oftfx.adapt(model, oftfx.OFT(block_size=32)).train(), "layers")
    given = list(oftfx.parameters(model))
    result = {
        name: measure(model, tokens, torch.optim.AdamW(given, lr=1e-5, **way), args.steps)
        for name, way in WAYS.items()
    }
    columns = list(next(iter(result.values())))
    lines = [
        (name, *(f"{statistics.median(took[column]):.2f}" for column in columns))
        for name, took in result.items()
    ]
    print(table(("AdamW", *(f"{column}, ms" for column in columns)), lines))
    setting = {
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "layers": args.layers,
        "parameters": len(given),
        "numbers": sum(parameter.numel() for parameter in given),
    }
    if args.out:
        args.out.write_text(json.dumps({"setting": setting, "ms": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
