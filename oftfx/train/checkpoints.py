"""A Trainer's checkpoints, holding the adapter alone.

Three private methods of transformers' Trainer are replaced on the instance, here and nowhere else.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import oftfx
from oftfx.attach import record_holder
from oftfx.checkpoint import MANIFEST, restore
from oftfx.errors import PlanError
from oftfx.modules import in_use

if TYPE_CHECKING:
    from transformers import Trainer


def keep_adapter_alone(trainer: "Trainer") -> None:
    """Makes a Trainer's checkpoints adapter directories, which `oftfx.load` reads.

    Where the adapter is not all that is trained, and where the model is spread over processes, the
    Trainer's own checkpoints are left as they are: whole.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    save, load, load_best = trainer._save, trainer._load_from_checkpoint, trainer._load_best_model

    def _save(output_dir: str | None = None, state_dict: Any = None) -> None:
        name = _only_adapter(trainer.model)
        if name is None:
            save(output_dir, state_dict)
        elif trainer.args.should_save:
            directory = Path(output_dir or trainer.args.output_dir)
            oftfx.save(trainer.model, directory, name)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(directory)
            torch.save(trainer.args, directory / "training_args.bin")

    def _load_from_checkpoint(resume_from_checkpoint: str, model: Any = None) -> None:
        if not _restored(trainer.model, resume_from_checkpoint):
            load(resume_from_checkpoint, model)

    def _load_best_model() -> None:
        if not _restored(trainer.model, trainer.state.best_model_checkpoint):
            load_best()

    trainer._save = _save
    trainer._load_from_checkpoint = _load_from_checkpoint
    trainer._load_best_model = _load_best_model


def _only_adapter(model: Any) -> str | None:
    """The name of the model's one adapter in use, if nothing else is trained."""
    try:
        held = record_holder(model)
    except PlanError:
        return None
    names = [name for name in in_use(model) if name in held]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if len(names) != 1 or trained != {id(p) for p in oftfx.parameters(model)}:
        return None
    return names[0]


def _restored(model: Any, directory: str) -> bool:
    if not (Path(directory) / MANIFEST).is_file():
        return False
    restore(model, directory, in_use(model)[0])
    return True
