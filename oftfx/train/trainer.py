"""One run of transformers' Trainer on an adapted model."""

import tempfile
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from oftfx.train import measure
from oftfx.train.callback import watch
from oftfx.train.data import collate
from oftfx.train.progress import Stage
from oftfx.train.report import Curves
from oftfx.train.resume import Checkpoints

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainerControl, TrainerState

    from oftfx.train.job import Job

WAYPOINTS = 3
"""How often the held-out loss is measured between the first and the last step."""

HELD_OUT = "held_out_loss"


def train(
    model: "PreTrainedModel",
    blocks: "Dataset",
    held_out: "Dataset",
    job: "Job",
    kept: Checkpoints | None,
    line: Stage,
) -> Curves:
    """Trains the rotations in place, with AdamW, a warm-up and a cosine to zero.

    Args:
        model: An adapted model.
        blocks: Packed tokens to train on.
        held_out: Packed tokens to measure on along the way.
        job: Steps, batch size, learning rate and seed.
        kept: Where to write checkpoints, and to go on from the newest; None for nowhere.
        line: The progress line to move.

    Returns:
        The training loss at every step, and the held-out loss at some.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(kept.directory) if kept else scratch,
                max_steps=job.steps,
                per_device_train_batch_size=job.batch_size,
                learning_rate=job.lr,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                # Decay would pull the rotations towards the identity, which is the prior already.
                weight_decay=0.0,
                seed=job.seed,
                logging_steps=1,
                save_strategy="steps" if kept else "no",
                save_steps=kept.every if kept else 1,
                save_total_limit=2,
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.accelerator.is_available(),
            ),
            train_dataset=blocks,
            data_collator=collate,
            callbacks=[_Tracker(held_out, job, line)],
        )
        trainer.remove_callback(PrinterCallback)  # the progress line shows what it would print
        watch(trainer)
        newest = kept.newest() if kept else None
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    history = trainer.state.log_history
    return Curves(
        train=[(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        held_out=[(entry["step"], entry[HELD_OUT]) for entry in history if HELD_OUT in entry],
    )


class _Tracker(TrainerCallback):
    """Measures on the way, into the Trainer's own history, and moves the progress line."""

    def __init__(self, held_out: "Dataset", job: "Job", line: Stage) -> None:
        self.held_out = held_out
        self.job = job
        self.line = line
        self.every = job.steps // (WAYPOINTS + 1)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        self.line.advance(state.global_step)  # what an earlier run did

    def on_step_end(
        self,
        args: TrainingArguments,
        state: "TrainerState",
        control: "TrainerControl",
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        step = state.global_step
        self.line.advance()
        if self.every and step % self.every == 0 and step < self.job.steps:
            found = measure.losses(model, self.held_out, self.job.batch_size)
            state.log_history.append({"step": step, HELD_OUT: found.mean})

    def on_log(
        self,
        args: TrainingArguments,
        state: "TrainerState",
        control: "TrainerControl",
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.line.note(f"loss {logs['loss']:.3f}")
