"""One run of transformers' Trainer on an adapted model."""

import math
import tempfile
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from oftfx.train import measure
from oftfx.train.callback import PENALTY, watch
from oftfx.train.data import collate
from oftfx.train.errors import TrainingError
from oftfx.train.progress import Stage
from oftfx.train.report import Curves
from oftfx.train.resume import LAST, Checkpoints

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainerControl

    from oftfx.train.job import Job

WAYPOINTS = 3
"""How often the held-out loss is measured between the first and the last step."""

HELD_OUT, SECONDS = "held_out_loss", "seconds"


class Trained(NamedTuple):
    """What training took and gave, over all the processes that it took turns in.

    Attributes:
        curves: The training loss at every step, and the held-out loss at some.
        tokens: How many were trained on.
        seconds: How long the steps took.
    """

    curves: Curves
    tokens: int
    seconds: float


def train(
    model: "PreTrainedModel",
    blocks: "Dataset",
    held_out: "Dataset",
    job: "Job",
    kept: Checkpoints | None,
    line: Stage,
) -> Trained:
    """Trains the rotations in place, with AdamW, a warm-up and a cosine to zero.

    Args:
        model: An adapted model.
        blocks: Packed tokens to train on.
        held_out: Packed tokens to measure on along the way.
        job: Steps, batch size, learning rate and seed.
        kept: Where to write checkpoints, and to go on from the newest; None for nowhere.
        line: The progress line to move.

    Raises:
        TrainingError: The loss is not finite.
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
                warmup_steps=job.steps // 10,
                # Decay would pull the rotations towards the identity, which is the prior already.
                weight_decay=0.0,
                seed=job.seed,
                logging_steps=1,
                logging_nan_inf_filter=False,  # which shows NaN as 0
                include_num_input_tokens_seen="all",
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
        state = TrainerState.load_from_json(str(newest / LAST)) if newest else TrainerState()
        if state.global_step < job.steps:
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
            state = trainer.state
        else:  # stopped after its last step: the Trainer would take one more
            trainer._load_from_checkpoint(str(newest))
            line.advance(state.global_step)
    history = state.log_history
    curves = Curves(
        train=[(entry["step"], _own_loss(entry)) for entry in history if "loss" in entry],
        held_out=[(entry["step"], entry[HELD_OUT]) for entry in history if HELD_OUT in entry],
    )
    return Trained(curves, state.num_input_tokens_seen, _seconds(history))


def check_finite(loss: float, when: str, lr: float) -> None:
    """Refuses a loss that is no number, after which nothing more is learned.

    Raises:
        TrainingError: The loss is not finite.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"The loss is {loss} {when}: use a lower lr than {lr:g}; if it is so from the first "
            "step on, the model itself is at fault: try another dtype."
        )


def _own_loss(entry: dict[str, float]) -> float:
    """The model's loss, without the regularisers that were added to it."""
    return entry["loss"] - entry.get(PENALTY, 0.0)


def _seconds(history: list[dict[str, float]]) -> float:
    """How long the steps of a Trainer's history took."""
    return next((entry[SECONDS] for entry in reversed(history) if SECONDS in entry), 0.0)


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
        # What an earlier run did.
        self.line.advance(state.global_step)
        self.start = time.perf_counter() - _seconds(state.log_history)

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
            state.log_history[-1][SECONDS] = time.perf_counter() - self.start
            loss = _own_loss(logs)
            check_finite(loss, f"at step {state.global_step}", self.job.lr)
            self.line.note(f"loss {loss:.3f}")
