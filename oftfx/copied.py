"""Tensors of the base that an adapter trains as they are: a new head, the norms, the biases.

    base                                  adapted
    score.weight: Parameter W             score.weight: Parameter, a copy of W that is trained
                                          W itself is set aside, with the adapter's record

The base's tensor is never written to: what is tied to it stays, and taking the copy away gives the
base back bit for bit. An adapter's copies are in the model while it is in use.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from oftfx.errors import PlanError

if TYPE_CHECKING:
    from oftfx.plan import Copied

RECORD = "_oftfx"
"""Where an adapted model remembers its adapters, by name, in the order they were added."""


class Copies:
    """What one adapter trains as it is, and what the base has in its place.

    Args:
        model: The module that is adapted.
        copied: What is to be trained.
        others: The copies of its other adapters, which may be of the same tensors.

    Attributes:
        own: The base's own tensors by name.
        in_place: Whether the model has the copies now.
    """

    def __init__(
        self, model: nn.Module, copied: Iterable["Copied"], others: Iterable["Copies"]
    ) -> None:
        known = {name: own for other in others for name, own in other.own.items()}
        names = [tensor.name for tensor in copied]
        self.own: dict[str, nn.Parameter] = {
            name: known[name] if name in known else model.get_parameter(name) for name in names
        }
        self._away = {name: nn.Parameter(own.detach().clone()) for name, own in self.own.items()}
        self.in_place = False

    def parameters(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        """The copies by name, in the model or not."""
        if not self.in_place:
            return self._away
        return {name: model.get_parameter(name) for name in self.own}

    def put(self, model: nn.Module) -> None:
        """Puts the copies in their places."""
        for name, copy in self._away.items():
            _place(model, name, _moved(copy, model.get_parameter(name)))
        self._away, self.in_place = {}, True

    def take_away(self, model: nn.Module) -> None:
        """Puts the base's own tensors back in their places."""
        if self.in_place:
            self._away, self.in_place = dict(self.parameters(model)), False
            for name, own in self.own.items():
                _place(model, name, _moved(own, self._away[name]))


def check(model: nn.Module, copied: Iterable["Copied"]) -> None:
    """That every tensor is there to be copied.

    Raises:
        PlanError: One is missing or has another shape.
    """
    for tensor in copied:
        try:
            shape = tuple(model.get_parameter(tensor.name).shape)
        except AttributeError:
            shape = None
        if shape != tensor.shape:
            raise PlanError(
                f"also_train: {tensor.name} has shape {shape}, the plan expects {tensor.shape}: it "
                "was made for another model."
            )


def check_apart(copies: Mapping[str, Iterable[str]]) -> None:
    """That no two adapters of these train one tensor.

    Args:
        copies: By adapter, the names of what it trains as it is.

    Raises:
        PlanError: Two do.
    """
    taken: dict[str, str] = {}
    for adapter, names in copies.items():
        for name in names:
            if (other := taken.setdefault(name, adapter)) != adapter:
                raise PlanError(
                    f"also_train: {adapter!r} and {other!r} both train {name} as it is, so one "
                    "of them can be in use at a time: put the other out of it by oftfx.use."
                )


def of(model: nn.Module, name: str | None = None) -> Iterator[tuple[nn.Module, str, Copies]]:
    """The parts of a model that were adapted, the adapters there, and their copies."""
    for part in model.modules():
        for adapter, record in vars(part).get(RECORD, {}).items():
            if name in (None, adapter):
                yield part, adapter, record.copies


def settle(model: nn.Module, used: Collection[str]) -> None:
    """Gives a model the copies of the adapters in use, and the base's own tensors elsewhere."""
    found = list(of(model))
    for part, adapter, copies in found:
        if adapter not in used:
            copies.take_away(part)
    for part, adapter, copies in found:
        if adapter in used and not copies.in_place:
            copies.put(part)


def _place(model: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = value


def _moved(value: nn.Parameter, there: nn.Parameter) -> nn.Parameter:
    """A tensor that missed it when the model went to another device or dtype."""
    moved = value.detach().to(there.device, there.dtype)
    # What is still tied to the base is the same object, which moved along.
    if moved.data_ptr() == value.data_ptr():
        return value
    return nn.Parameter(moved, value.requires_grad)
