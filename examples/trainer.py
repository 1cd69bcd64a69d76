"""transformers' Trainer on an adapted model: early stopping, the best checkpoint, resuming.

    python examples/trainer.py
    torchrun --nproc-per-node 2 examples/trainer.py out/trainer

A tiny random model; nothing is downloaded. The second line runs it on several GPUs.
"""

import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tiny import WORDS, language_model
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

import oftfx
from oftfx.train import watch

counting = [torch.arange(2, 10).roll(start).tolist() for start in range(8)]
rows = Dataset.from_dict({"input_ids": counting * 4, "labels": counting * 4})


def make_trainer(directory: str, steps: int) -> Trainer:
    """A watched Trainer of a newly adapted model, with a rate for each group of layers."""
    model = oftfx.adapt(language_model(len(WORDS)), oftfx.OFT(block_size=16))
    # What is trained is ordinary parameters, named by the layer that they turn.
    groups = {"attention": [], "mlp": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["attention" if "self_attn" in name else "mlp"].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups["attention"], "lr": 2e-2}, {"params": groups["mlp"], "lr": 1e-2}],
        weight_decay=0.0,
    )
    arguments = TrainingArguments(
        directory,
        max_steps=steps,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        optimizers=(optimizer, None),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    watch(trainer)  # health in the log, checkpoints of the adapter alone
    return trainer


directory = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
through = make_trainer(f"{directory}/through", 6)
through.train()

make_trainer(f"{directory}/parts", 4).train()  # as if it had been stopped there
resumed = make_trainer(f"{directory}/parts", 6)
resumed.train(resume_from_checkpoint=True)

losses = [
    [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    for trainer in (through, resumed)
]
print("held-out loss " + " → ".join(f"{loss:.3f}" for loss in losses[0]))
assert losses[0][-1] < losses[0][0]
assert losses[1] == losses[0]  # to the last bit

# A checkpoint is an adapter directory.
checkpoint = Path(through.state.best_model_checkpoint)
again = oftfx.load(language_model(len(WORDS)), checkpoint)
pairs = zip(oftfx.parameters(again), oftfx.parameters(through.model), strict=True)
assert all(torch.equal(one, other.cpu()) for one, other in pairs)
