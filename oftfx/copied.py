"""Tensors of the base that an adapter trains as they are: a new head, the norms, the biases.

    base                                  adapted
    score.weight: Parameter W             score.weight: Parameter, a copy of W that is trained
                                          W itself is set aside, with the adapter's record

The base's tensor is never written to: what is tied to it stays, and taking the copy away gives the
base back bit for bit.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from oftfx.errors import PlanError
from oftfx.plan import Copied

Kept = Mapping[str, nn.Parameter]
"""The base's own tensors by name, while copies stand in their places."""


def check(model: nn.Module, copied: Iterable[Copied], taken: Mapping[str, str]) -> None:
    """That every tensor is there to be copied.

    Args:
        model: The module.
        copied: What is to be trained.
        taken: By name, the adapter that trains a copy of it already.

    Raises:
        PlanError: One is missing, has another shape, or is trained by another adapter.
    """
    for tensor in copied:
        if tensor.name in taken:
            raise PlanError(
                f"also_train: {tensor.name} is trained by the adapter {taken[tensor.name]!r} "
                "already; leave it to one of them."
            )
        try:
            shape = tuple(model.get_parameter(tensor.name).shape)
        except AttributeError:
            shape = None
        if shape != tensor.shape:
            raise PlanError(
                f"also_train: {tensor.name} has shape {shape}, the plan expects {tensor.shape}: it "
                "was made for another model."
            )


def put(model: nn.Module, copied: Iterable[Copied]) -> Kept:
    """Puts trained copies in the places of tensors, and gives the tensors."""
    kept = {}
    for tensor in copied:
        own = model.get_parameter(tensor.name)
        kept[tensor.name] = own
        _place(model, tensor.name, nn.Parameter(own.detach().clone()))
    return kept


def give_back(model: nn.Module, kept: Kept) -> None:
    """Puts the base's own tensors back in their places."""
    for name, own in kept.items():
        _place(model, name, _moved(own, model.get_parameter(name)))


@contextmanager
def set_aside(parts: Iterable[tuple[nn.Module, Kept]]) -> Iterator[None]:
    """Within it, modules have the base's own tensors."""
    trained = [
        (model, name, model.get_parameter(name), own)
        for model, kept in parts
        for name, own in kept.items()
    ]
    try:
        for model, name, copy, own in trained:
            _place(model, name, _moved(own, copy))
        yield
    finally:
        for model, name, copy, _ in trained:
            _place(model, name, copy)


def _place(model: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = value


def _moved(own: nn.Parameter, copy: nn.Parameter) -> nn.Parameter:
    """The base's tensor, which missed it when the model went to another device or dtype."""
    moved = own.detach().to(copy.device, copy.dtype)
    # What is still tied to the base is the same object, which moved along.
    return own if moved.data_ptr() == own.data_ptr() else nn.Parameter(moved, own.requires_grad)
