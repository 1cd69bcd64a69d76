"""A model's weights as floats, however they are stored, for directions that depend on them."""

from typing import cast

import torch
from torch import Tensor

from oftfx import sites
from oftfx.capture import Model
from oftfx.errors import MergeError, PlanError
from oftfx.host import parameters_of
from oftfx.plan import Site
from oftfx.sites.quantised import device_of


class Weights:
    """The weights of a model's sites.

    Args:
        model: An nn.Module, GraphModule or ExportedProgram.
    """

    def __init__(self, model: Model) -> None:
        self._parameters = parameters_of(model)
        self._layers = sites.quantised_layers(model)

    def like(self, site: Site) -> Tensor:
        """An empty tensor of the device and dtype, float32 or float64, of a site's `floats`.

        Raises:
            PlanError: The model does not have it, or it has no values.
        """
        layer = self._layers.get(site.weight)
        weight = self._parameters.get(site.weight)
        if layer is None and weight is None:
            raise PlanError(f"{site.weight}: the plan's weight is not in this model; plan it anew.")
        dtype = torch.float32 if layer is not None else cast("Tensor", weight).dtype
        device = device_of(layer[0]) if layer is not None else cast("Tensor", weight).device
        if device.type == "meta":
            raise PlanError(
                f"{site.fqn}: its weight is on `meta` (not loaded, or offloaded), and with it "
                "would be the rotation's directions, which are made once: load the weights before "
                "adapting. A plan can be made without them."
            )
        wide = torch.promote_types(dtype, torch.float32)
        return torch.empty(0, dtype=wide, device=device)

    def floats(self, site: Site) -> Tensor:
        """A site's weight, (out, in), float32 or float64, for the caller alone to hold.

        Raises:
            PlanError: It is not there, cannot be made floats, or is not finite.
        """
        like = self.like(site)
        if site.weight in self._layers:
            module, quantiser = self._layers[site.weight]
            try:
                weight = quantiser.dequantise(module).to(like.dtype)
            except MergeError as error:
                raise PlanError(f"{site.fqn}: the rotation's directions need W. {error}") from error
        else:
            held = self._parameters[site.weight].detach()
            if hasattr(held, "full_tensor"):  # in shards, one of which is here
                held = held.full_tensor()
            weight = held.to(like.dtype)
        if not torch.isfinite(weight).all():
            raise PlanError(
                f"{site.fqn}: its weight is not finite, so it has no singular vectors: mend the "
                "weight, or exclude the site."
            )
        return weight if site.layout == "out_in" else weight.mT

    def stacked(self, readers: list[Site]) -> Tensor:
        """The weights that one rotation stands before, one below the other."""
        read = [self.floats(site) for site in readers]
        return read[0] if len(read) == 1 else torch.cat(read)
