"""The best learning rate of OFT for every block size, with `unit_rate` and without, on a small LM.

    python benchmarks/rates.py [--steps 60] [--hidden 64] [--layers 2]

A small byte-level Llama is trained on this project's documentation and then, frozen, adapted to its
Python source. What counts is the loss on source that was held out, after all steps at a constant
rate. It takes a minute on a GPU, and many on a CPU.
"""

import argparse
import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import oftfx

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = (8, 16, 32, 64)
UNITS = tuple(0.01 * 2**k for k in range(7))
"""Rates tried with `unit_rate`; without, those that are the same for blocks of 16."""


@dataclass(frozen=True)
class Setting:
    """A model's size and how long it is trained."""

    hidden: int = 64
    layers: int = 2
    tokens: int = 64
    batch: int = 16
    before: int = 300
    steps: int = 60


def text(pattern: str) -> Tensor:
    """All bytes of the project's files of a kind."""
    files = sorted(ROOT.glob(pattern))
    return torch.tensor(list(b"".join(file.read_bytes() for file in files)), device=DEVICE)


def batches(data: Tensor, setting: Setting, seed: int, count: int) -> Iterator[Tensor]:
    """Random pieces, (batch, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        start = torch.randint(len(data) - setting.tokens, (setting.batch,), generator=generator)
        yield data[(start[:, None] + torch.arange(setting.tokens)).to(data.device)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean over its tokens."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def trained(model: nn.Module, data: Tensor, setting: Setting, rate: float, steps: int) -> nn.Module:
    """The model after some steps of Adam."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for ids in batches(data, setting, 1, steps):
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@functools.cache
def base(setting: Setting) -> nn.Module:
    """A model of the documentation."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=setting.hidden,
        intermediate_size=2 * setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=setting.tokens,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).train().to(DEVICE)
    return trained(model, text("docs/**/*.md"), setting, 3e-3, setting.before)


def losses(setting: Setting, unit_rate: bool, blocks: Sequence[int] = BLOCKS) -> Tensor:
    """Held-out losses, (block sizes, rates)."""
    model, source = base(setting), text("oftfx/**/*.py")
    kept, held_out = source[: len(source) * 9 // 10], source[len(source) * 9 // 10 :]
    out = torch.empty(len(blocks), len(UNITS))
    for i, b in enumerate(blocks):
        for j, unit in enumerate(UNITS):
            spec = oftfx.OFT(block_size=b, unit_rate=unit_rate)
            adapted = oftfx.adapt(copy.deepcopy(model), spec)
            rate = unit if unit_rate else unit / (2 * (16 - 1))
            trained(adapted, kept, setting, rate, setting.steps)
            with torch.no_grad():
                found = [loss_of(adapted, ids) for ids in batches(held_out, setting, 2, 8)]
            out[i, j] = torch.stack(found).mean()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--hidden", type=int, default=Setting.hidden)
    parser.add_argument("--layers", type=int, default=Setting.layers)
    args = parser.parse_args()
    setting = Setting(hidden=args.hidden, layers=args.layers, steps=args.steps)
    for unit_rate in (True, False):
        rates = [unit if unit_rate else unit / 30 for unit in UNITS]
        print("unit_rate" if unit_rate else "entries of Q", *(f"{rate:8.2g}" for rate in rates))
        for b, row in zip(BLOCKS, losses(setting, unit_rate), strict=True):
            best = rates[int(row.argmin())]
            print(f"b={b:<10}", *(f"{loss:8.3f}" for loss in row.tolist()), f" best {best:.2g}")


if __name__ == "__main__":
    main()
