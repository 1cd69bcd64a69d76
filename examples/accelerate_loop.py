"""A training loop of one's own with accelerate: gradient accumulation, a checkpoint, resuming.

    python examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py out/loop

A tiny random model; nothing is downloaded. The second line runs it on several GPUs.
"""

import sys
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tiny import WORDS, language_model

import oftfx
from oftfx.train import checkpoint_adapter

STEPS, ACCUMULATED = 6, 2


def train(directory: str, first: int, last: int) -> list[float]:
    """Trains from step ``first`` to ``last``, from and into a checkpoint; the losses."""
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED)
    checkpoint_adapter(accelerator)  # the adapter alone: the base is where it was
    model = oftfx.adapt(language_model(len(WORDS)), oftfx.OFT(block_size=16))
    optimizer = torch.optim.AdamW(oftfx.parameters(model), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    if first:
        accelerator.load_state(directory)
    losses = []
    for step in range(first * ACCUMULATED, last * ACCUMULATED):
        ids = torch.arange(2, 10).roll(step % 3).expand(2, -1).to(accelerator.device)
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.save_state(directory)
    return losses


scratch = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
through = train(f"{scratch}/one", 0, STEPS)
resumed = train(f"{scratch}/two", 0, STEPS // 2) + train(f"{scratch}/two", STEPS // 2, STEPS)
print(f"loss {through[0]:.3f} → {through[-1]:.3f}")
assert through[-1] < through[0]
assert resumed == through  # to the last bit
