"""Models that several processes train together: DistributedDataParallel and FSDP2.

A sharded parameter is a `DTensor`, of which a process holds a part. Reading it whole is collective:
every process has to call what does so.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from oftfx.errors import PlanError


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded over processes; any other as it is."""
    # By its method: importing DTensor costs what everyone would pay.
    gather = getattr(tensor, "full_tensor", None)
    result: Tensor = tensor if gather is None else gather()
    return result


def is_sharded(model: Any) -> bool:
    """Whether a process holds parts of a module's parameters alone."""
    if not isinstance(model, nn.Module):
        return False
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def check_alone(model: Any) -> None:
    """That no process group was told a model's parameters, which new ones would not belong to.

    Raises:
        PlanError: The model is wrapped already; says in which order to do it.
    """
    if isinstance(model, DistributedDataParallel) or is_sharded(model):
        how = "fully_shard" if is_sharded(model) else "DistributedDataParallel"
        raise PlanError(
            f"this model is wrapped by {how} already, which would not know the rotations' "
            f"parameters: adapt (or load) first, and wrap then."
        )
