"""Finetuning on transformers' Trainer: the job behind ``oftfx finetune``.

Needs the ``train`` extra: ``pip install 'oftfx[train]'``.
"""

from oftfx.train.callback import HealthCallback, watch
from oftfx.train.checkpoints import checkpoint_adapter
from oftfx.train.errors import DataError, ModelError, OutputError, TrainingError
from oftfx.train.job import Job, run
from oftfx.train.reference import reference
from oftfx.train.report import Report, show

__all__ = [
    "Job",
    "run",
    "Report",
    "show",
    "HealthCallback",
    "watch",
    "checkpoint_adapter",
    "reference",
    "DataError",
    "ModelError",
    "OutputError",
    "TrainingError",
]
