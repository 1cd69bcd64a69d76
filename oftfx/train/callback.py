"""What rotations ask of a Trainer: their health in its log, regularisers and projections."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback

import oftfx
from oftfx.train.checkpoints import keep_adapter_alone

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


PENALTY = "oft_penalty"
"""What the log calls the regularisers' part of the loss."""


class HealthCallback(TrainerCallback):
    """Adds the worst values over all rotations to every training log, and warns.

    The log gains ``oft_norm`` (largest ‖Q‖₂), ``oft_orthogonality_error`` and ``oft_angle`` (in
    radians); [`watch`][oftfx.train.watch] adds ``oft_penalty``. A rotation whose ‖Q‖₂ reaches 1,
    where the Cayley–Neumann series means nothing, is warned about once.
    """

    def on_log(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        model: Any = None,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Extends ``logs`` and the newest entry of ``state.log_history``."""
        if logs is None or "loss" not in logs:  # an evaluation's or the closing summary's log
            return
        health = oftfx.health(model)
        health.warn()
        worst = {
            "oft_norm": health.norm.max().item(),
            "oft_orthogonality_error": health.orthogonality_error.max().item(),
            "oft_angle": health.angle.max().item(),
        }
        logs.update(worst)
        state.log_history[-1].update(worst)


class _Projection(TrainerCallback):
    """Keeps parameters where their specs want them, after every optimizer step."""

    def on_optimizer_step(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        oftfx.project(model)


def watch(trainer: "Trainer") -> None:
    """Makes a Trainer do what rotations ask for: call it once, before ``train()``.

    It logs their health ([`HealthCallback`][oftfx.train.HealthCallback], ahead of the reporters,
    so that what ``report_to`` names sees the values), adds [`oftfx.penalty`][oftfx.penalty] to the
    training loss, and calls [`oftfx.project`][oftfx.project] after every optimizer step. Where the
    penalty is not zero, the log has it apart as ``oft_penalty``: the model's own loss is
    ``loss - oft_penalty``. Its checkpoints hold the adapter alone, as `oftfx.load` reads it, unless
    more than one adapter is trained.
    """
    keep_adapter_alone(trainer)
    added = _Penalty()
    trainer.callback_handler.callbacks[:0] = [HealthCallback(), added]
    trainer.add_callback(_Projection())
    trainer.compute_loss = _penalised(trainer, added)


class _Penalty(TrainerCallback):
    """Logs what was added to the loss, which the Trainer logs as the mean over steps."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0  # stays on the device between logs
        self.steps = 0.0

    def add(self, penalty: Tensor, steps: float) -> None:
        """Counts one micro-batch, which is this part of a step."""
        self.total = self.total + penalty.detach() * steps
        self.steps += steps

    def on_log(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self.steps:
            return
        mean = float(self.total) / self.steps
        if mean:
            logs[PENALTY] = state.log_history[-1][PENALTY] = mean
        self.total, self.steps = 0.0, 0.0


def _penalised(trainer: "Trainer", added: _Penalty) -> Callable[..., Any]:
    """The Trainer's own ``compute_loss``, with the regularisers added in training."""
    inner = trainer.compute_loss

    @functools.wraps(inner)
    def compute_loss(
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        result = inner(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        if not model.training:
            return result
        loss, *outputs = result if return_outputs else (result,)
        penalty = oftfx.penalty(trainer.model).to(loss.device)
        part = 1 / trainer.current_gradient_accumulation_steps
        added.add(penalty, part)
        if _summed(trainer, num_items_in_batch):
            penalty = penalty * part
        loss = loss + penalty
        return (loss, *outputs) if return_outputs else loss

    return compute_loss


def _summed(trainer: "Trainer", num_items_in_batch: Any) -> bool:
    """Whether the losses of one optimizer step are summed; otherwise the Trainer averages them."""
    stated = getattr(trainer, "loss_is_scaled_for_ga", None)
    if stated is not None:
        return bool(stated)
    by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return by_model or trainer.compute_loss_func is not None
