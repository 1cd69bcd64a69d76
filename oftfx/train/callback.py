"""Health of the rotations, in the Trainer's own log."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

import oftfx

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class HealthCallback(TrainerCallback):
    """Adds the worst values over all rotations to every training log, and warns.

    The log gains ``oft_norm`` (largest ‖Q‖₂), ``oft_orthogonality_error`` and ``oft_angle`` (in
    radians). A rotation whose ‖Q‖₂ reaches 1, where the Cayley–Neumann series means nothing, is
    warned about once.
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


def watch(trainer: "Trainer") -> None:
    """Gives a Trainer a [`HealthCallback`][oftfx.train.HealthCallback], ahead of its reporters.

    Passed as ``callbacks=[HealthCallback()]`` it would run after them, and what ``report_to``
    names (TensorBoard, …) would not see the new values.
    """
    trainer.callback_handler.callbacks.insert(0, HealthCallback())
