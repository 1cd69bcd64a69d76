"""TRL's SFTTrainer on an adapted model: checkpoints of the adapter alone, a rate for each group.

    pip install trl
    python examples/trl_sft.py

A tiny random model and a tokenizer made here; nothing is downloaded.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tiny import language_model, tokenizer
from trl import SFTConfig, SFTTrainer

import oftfx
from oftfx.train import watch

tokens = tokenizer()
model = oftfx.adapt(language_model(len(tokens)), oftfx.OFT(block_size=16))
texts = Dataset.from_dict({"text": ["one two three four five six seven eight"] * 32})

# What is trained is ordinary parameters, so any optimizer takes them, in groups or not.
groups = {"attention": [], "mlp": []}
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        groups["attention" if "self_attn" in name else "mlp"].append(parameter)
optimizer = torch.optim.AdamW(
    [{"params": groups["attention"], "lr": 2e-2}, {"params": groups["mlp"], "lr": 1e-2}],
    weight_decay=0.0,
)

with tempfile.TemporaryDirectory() as scratch:
    arguments = SFTConfig(
        scratch,
        max_steps=20,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=5,
        save_steps=10,
        max_length=16,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model, arguments, train_dataset=texts, processing_class=tokens, optimizers=(optimizer, None)
    )
    watch(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}")
    assert losses[-1] < losses[0]

    # A checkpoint is an adapter directory.
    again = oftfx.load(language_model(len(tokens)), Path(scratch, "checkpoint-20"))
    pairs = zip(oftfx.parameters(again), oftfx.parameters(model), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
