"""A few values of each adapted weight, by which an adapter knows its base again.

Those of a quantised weight are the floats it stands for, so that an adapter trained on a quantised
base is known on the float model it was made from, and the other way round.
"""

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from oftfx import sites
from oftfx.capture import Model, capture
from oftfx.errors import MergeError
from oftfx.host import parameters_of
from oftfx.sites.quantised import device_of
from oftfx.spread import whole

_SAMPLES = 16
_CAST = 0.02  # relative: a cast to half precision passes, other weights do not
_QUANTISED = 0.5  # where one of the two is quantised: 4 bits pass, other weights do not


class Fingerprint:
    """The weights of a model by name, each as the (out, in) or (in, out) matrix it stands for."""

    def __init__(self, model: Model) -> None:
        graph = isinstance(model, (fx.GraphModule, ExportedProgram))
        self.parameters = capture(model).tensors if graph else parameters_of(model)
        self.layers = sites.quantised_layers(model)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a weight; None when there is none of this name."""
        if name in self.layers:
            module, quantiser = self.layers[name]
            return quantiser.shape(module)
        weight = self.parameters.get(name)
        return None if weight is None else tuple(weight.shape)

    def samples(self, name: str) -> list[float] | None:
        """Values of a weight; None where it has none: on `meta`, or of a packed format."""
        weight = self._values(name)
        if weight is None or weight.device.type == "meta":
            return None
        places = torch.linspace(0, weight.numel() - 1, _SAMPLES, dtype=torch.float64).long()
        rows, columns = places // weight.shape[1], places % weight.shape[1]
        picked = weight.detach()[rows.to(weight.device), columns.to(weight.device)]
        return picked.double().tolist()

    def agree(self, name: str, there: list[float] | None, quantised_there: bool) -> bool:
        """Whether a weight has the values that were sampled elsewhere, as far as both tell."""
        here = self.samples(name)
        if here is None or there is None:
            return True
        a, b = torch.tensor(here), torch.tensor(there)
        within = _QUANTISED if quantised_there or name in self.layers else _CAST
        return bool((a - b).norm() <= within * b.norm())

    def _values(self, name: str) -> Tensor | None:
        if name not in self.layers:
            return whole(self.parameters[name])
        module, quantiser = self.layers[name]
        if device_of(module).type == "meta" or quantiser.fault(module):
            return None
        try:
            return quantiser.dequantise(module)
        except MergeError:
            return None
