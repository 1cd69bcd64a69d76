"""What a spec asks of its parameters beyond the loss: a regulariser, or a set to stay in."""

import torch
from torch import Tensor

from oftfx.capture import Model, unwrap
from oftfx.health import batches, rotations_of
from oftfx.ops.precision import exactly
from oftfx.rotations import penalty_of, projection_of


def penalty(model: Model, name: str | None = None) -> Tensor:
    """The regularisers of a model's rotations: add it to the loss.

    It is the sum over all sites, for qGOFT and HRA; zero for the methods whose maps are orthogonal
    by construction.

    Args:
        model: An adapted nn.Module, GraphModule or ExportedProgram.
        name: One adapter, in use or not; None for those in use.

    Returns:
        (), differentiable with respect to the rotations' parameters, on the device of the first.

    Raises:
        PlanError: The model has no adapter (or none of this name, or none in use).
    """
    found = rotations_of(unwrap(model), name)
    device = next(iter(found[0].tensors.values())).device
    total = torch.zeros((), device=device)
    regularised = [rotation for rotation in found if penalty_of(rotation.spec)]
    for spec, stacked, _ in batches(regularised):
        regulariser = penalty_of(spec)
        assert regulariser is not None
        with exactly(device):
            total = total + regulariser(stacked, spec).sum().to(device)
    return total


@torch.no_grad()
def project(model: Model, name: str | None = None) -> None:
    """Puts the parameters back where their specs want them: call it after every optimizer step.

    For COFT; nothing changes for parameters that are there already, nor for other methods. A
    Trainer that is [`watched`][oftfx.train.watch] does it by itself, and an optimizer does after
    ``optimizer.register_step_post_hook(lambda *_: oftfx.project(model))``.

    Args:
        model: An adapted nn.Module, GraphModule or ExportedProgram.
        name: One adapter, in use or not; None for those in use.

    Raises:
        PlanError: The model has no adapter (or none of this name, or none in use).
    """
    for rotation in rotations_of(unwrap(model), name):
        if (projected := projection_of(rotation.spec)) is not None:
            for key, value in projected(rotation.tensors, rotation.spec).items():
                rotation.tensors[key].copy_(value)
