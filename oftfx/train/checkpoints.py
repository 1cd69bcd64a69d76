"""Checkpoints that hold the adapter alone, of transformers' Trainer and of accelerate.

Three private methods of transformers' Trainer are replaced on the instance, here and nowhere else.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import oftfx
from oftfx.attach import records_of
from oftfx.checkpoint import MANIFEST, restore
from oftfx.errors import PlanError
from oftfx.modules import in_use
from oftfx.spread import is_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator
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


def checkpoint_adapter(accelerator: "Accelerator") -> None:
    """Makes ``save_state`` of accelerate write, and ``load_state`` read, the adapter alone.

    Call it before the first of either. A model that is not adapted, that trains more than one
    adapter, or that is sharded over processes is saved whole, as accelerate does.

    Args:
        accelerator: Of your training loop.

    Raises:
        PlanError: From ``save_state`` and ``load_state``: more than one of the models that were
            prepared is adapted.
    """

    def adapted(models: list[Any]) -> list[tuple[int, str]]:
        names = [_only_adapter(accelerator.unwrap_model(model)) for model in models]
        found = [(index, name) for index, name in enumerate(names) if name is not None]
        if len(found) > 1:
            raise PlanError(
                f"{len(found)} adapted models were prepared, and one adapter fits a directory: "
                "oftfx.save each, and leave checkpoint_adapter out."
            )
        return found

    def save(models: list[Any], weights: list[Any], directory: str) -> None:
        for index, name in adapted(models):
            if accelerator.is_main_process:
                oftfx.save(accelerator.unwrap_model(models[index]), directory, name)
            del weights[index]

    def load(models: list[Any], directory: str) -> None:
        for index, name in adapted(models):
            if (Path(directory) / MANIFEST).is_file():
                restore(accelerator.unwrap_model(models[index]), directory, name)
                del models[index]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _only_adapter(model: Any) -> str | None:
    """The name of the model's one adapter in use, if nothing else is trained.

    None where this process holds a part of it alone.
    """
    if is_sharded(model):
        return None
    try:
        held = records_of(model)
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
