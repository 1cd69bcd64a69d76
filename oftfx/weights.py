"""A model's weights as floats, however they are stored, for directions that depend on them."""

import functools
from typing import cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from oftfx import match, sites
from oftfx.capture import Model, read
from oftfx.errors import MergeError, PlanError
from oftfx.host import Host, host_of, parameters_of
from oftfx.plan import Site
from oftfx.regions import differentiable
from oftfx.sites.matmul import quantised_shape
from oftfx.sites.quantised import device_of
from oftfx.spread import whole


class Weights:
    """The weights of a model's sites.

    Args:
        model: An nn.Module, GraphModule or ExportedProgram.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
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
        try:
            weight = self._read(site).to(like.dtype)
        except MergeError as error:
            raise PlanError(f"{site.fqn}: the rotation's directions need W. {error}") from error
        if not torch.isfinite(weight).all():
            raise PlanError(
                f"{site.fqn}: its weight is not finite, so it has no singular vectors: mend the "
                "weight, or exclude the site."
            )
        return weight if site.layout == "out_in" else weight.mT

    def _read(self, site: Site) -> Tensor:
        if site.weight in self._layers:
            module, quantiser = self._layers[site.weight]
            return quantiser.dequantise(module)
        weight = whole(self._parameters[site.weight]).detach()
        if weight.is_floating_point() and tuple(weight.shape) == site.shape:
            return weight
        if site.weight not in self._packed:
            raise MergeError("This graph holds it packed: adapt the nn.Module, and trace that.")
        from oftfx.fold.packed import floats  # which needs all that edits graphs

        return floats(self._host, self._packed[site.weight], site.fqn)

    @functools.cached_property
    def _host(self) -> Host:
        assert isinstance(self._model, (fx.GraphModule, ExportedProgram))
        return host_of(differentiable(self._model))

    @functools.cached_property
    def _packed(self) -> dict[str, fx.Node]:
        """Of a graph, by the name of their weight, the nodes that multiply by one in 4 bits."""
        uses = (use for use in match.uses(read(self._host)) if use.x is not None)
        return {use.weight: use.node for use in uses if quantised_shape(use.node) is not None}

    def stacked(self, readers: list[Site]) -> Tensor:
        """The weights that one rotation stands before, one below the other."""
        read = [self.floats(site) for site in readers]
        return read[0] if len(read) == 1 else torch.cat(read)
