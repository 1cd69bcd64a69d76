"""A training loop of one's own with accelerate: gradient accumulation, a checkpoint, resuming.

    python examples/accelerate_loop.py

A tiny random model; nothing is downloaded. `accelerate launch` runs the same file on several GPUs.
"""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tiny import WORDS, language_model

import oftfx

STEPS, ACCUMULATED = 6, 2


def train(directory: str, first: int, last: int) -> list[float]:
    """Trains from step ``first`` to ``last``, from and into a checkpoint; the losses."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    model = language_model(len(WORDS))
    if first:
        oftfx.load(model, f"{directory}/adapter")  # the adapter alone: the base is where it was
    else:
        oftfx.adapt(model, oftfx.OFT(block_size=16))
    optimizer = torch.optim.AdamW(oftfx.parameters(model), lr=1e-2, weight_decay=0.0)
    if first:
        optimizer.load_state_dict(torch.load(f"{directory}/optimizer.pt"))
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(first * ACCUMULATED, last * ACCUMULATED):
        ids = torch.arange(2, 10).roll(step % 3).expand(2, -1)
        with accelerator.accumulate(model):
            loss = model(input_ids=ids.to(accelerator.device), labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    if accelerator.is_main_process:
        oftfx.save(accelerator.unwrap_model(model), f"{directory}/adapter")
        torch.save(optimizer.state_dict(), f"{directory}/optimizer.pt")
    return losses


with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
    through = train(one, 0, STEPS)
    resumed = train(two, 0, STEPS // 2) + train(two, STEPS // 2, STEPS)
    print(f"loss {through[0]:.3f} → {through[-1]:.3f}")
    assert through[-1] < through[0]
    assert resumed == through  # to the last bit
