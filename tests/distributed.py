"""One of two processes that train an adapted model together on the CPU: python distributed.py DIR.

Each writes what it ended with: its adapter, and what the model then computes.
"""

import os
import sys
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import oftfx

STEPS, MICRO = 3, 2
SPECS: dict[str, oftfx.Spec] = {
    "OFT": oftfx.OFT(block_size=4),
    "PSOFT": oftfx.PSOFT(rank=4),
    "LOFT": oftfx.LOFT(rank=4),
}


def model(method: str) -> nn.Module:
    """Always the same one, adapted."""
    x, given = rows(0, 0, 1), {}
    if method == "LOFT":
        given = {"calibration": [x], "loss": lambda out, batch: out.square().sum()}
    return oftfx.adapt(base(), SPECS[method], example_inputs=x, **given)


def base() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)]
    return nn.Sequential(*layers)


def rows(step: int, rank: int, ranks: int) -> Tensor:
    """A rank's share of a step's rows: of eight."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 8, generator=generator).chunk(ranks)[rank]


def train(wrapped: nn.Module, rank: int, ranks: int) -> list[float]:
    """A few steps of several micro-batches each; the losses."""
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        for micro in range(MICRO):
            loss = wrapped(rows(MICRO * step + micro, rank, ranks)).square().mean() / MICRO
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def ddp(plain: nn.Module) -> nn.Module:
    return DistributedDataParallel(plain)


def fsdp(plain: nn.Module) -> nn.Module:
    for layer in plain:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(plain)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": ddp, "fsdp": fsdp}


def main(directory: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", world_size=2, rank=rank)
    found = {}
    for name, method in product(WAYS, SPECS):
        plain = model(method)
        wrapped = WAYS[name](plain)
        losses = train(wrapped, rank, 2)
        # By all of them: what is sharded is gathered.
        oftfx.save(wrapped, f"{directory}/{name}-{method}-{rank}")
        plain.eval()
        with torch.no_grad():
            out = plain(rows(9, 0, 1))
        with pytest.raises(oftfx.PlanError, match=r"wrapped by .* already"):
            oftfx.adapt(wrapped, SPECS[method], "second", example_inputs=rows(9, 0, 1))
        if name == "fsdp":
            with pytest.raises(oftfx.MergeError, match="sharded over processes"):
                oftfx.merge(wrapped)
        found[name, method] = {"losses": losses, "norm": oftfx.health(wrapped).norm, "out": out}
    torch.save(found, f"{directory}/rank{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
