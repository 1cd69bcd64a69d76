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
_CAST = 2**-8  # relative: a cast to half precision passes, the merge of a short run does not
_QUANTISED = 0.3  # where one of the two is quantised: 4 bits pass, other weights do not


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
        if not weight.numel():
            return []
        places = torch.linspace(0, weight.numel() - 1, _SAMPLES, dtype=torch.float64).long()
        rows, columns = places // weight.shape[1], places % weight.shape[1]
        picked = weight.detach()[rows.to(weight.device), columns.to(weight.device)]
        return picked.double().tolist()

    def quantised(self, name: str) -> str | None:
        """The kind of quantised layer that a weight is of; None when of none."""
        return self.layers[name][1].KIND if name in self.layers else None

    def agree(self, name: str, there: list[float] | None, quantised_there: str | None) -> bool:
        """Whether a weight has the values that were sampled elsewhere, as far as both tell.

        Args:
            name: Of the weight.
            there: Its samples elsewhere.
            quantised_there: The kind of quantised layer that it was of, if of any.
        """
        here = self.samples(name)
        if here is None or there is None:
            return True
        a, b = torch.tensor(here), torch.tensor(there)
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return False
        a, b = a[finite], b[finite]  # what is finite in neither is no difference
        quantised_here = self.quantised(name)
        if quantised_here is not None and quantised_here == quantised_there:
            # A cast before quantising rounds a few places apart, a merge moves every scale.
            return bool(2 * ((a - b).abs() <= _CAST * b.abs()).sum() >= len(b))
        within = _CAST if quantised_here is quantised_there is None else _QUANTISED
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
