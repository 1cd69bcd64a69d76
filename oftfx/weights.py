"""A model's weights as floats: the one place that reads them, however they are stored."""

import torch
from torch import Tensor

from oftfx.capture import Model
from oftfx.errors import PlanError
from oftfx.host import parameters_of
from oftfx.plan import Site


class Weights:
    """The weights of a model's sites.

    Args:
        model: An nn.Module, GraphModule or ExportedProgram.
    """

    def __init__(self, model: Model) -> None:
        self._parameters = parameters_of(model)

    def stored(self, site: Site) -> Tensor:
        """A site's weight as it is stored; only its device and dtype are for every format.

        Raises:
            PlanError: The model does not have it, or it has no values.
        """
        weight = self._parameters.get(site.weight)
        if weight is None:
            raise PlanError(f"{site.weight}: the plan's weight is not in this model; plan it anew.")
        if weight.device.type == "meta":
            raise PlanError(
                f"{site.fqn}: its weight is on `meta` (not loaded, or offloaded), and with it "
                "would be the rotation's directions, which are made once: load the weights before "
                "adapting. A plan can be made without them."
            )
        return weight.detach()

    def floats(self, site: Site) -> Tensor:
        """A site's weight, (out, in), float32 or float64, for the caller alone to hold.

        Raises:
            PlanError: It is not there, or not finite.
        """
        stored = self.stored(site)
        weight = stored.to(torch.promote_types(stored.dtype, torch.float32))
        if not torch.isfinite(weight).all():
            raise PlanError(
                f"{site.fqn}: its weight is not finite, so it has no singular vectors: mend the "
                "weight, or exclude the site."
            )
        return weight if site.layout == "out_in" else weight.mT

    def stacked(self, sites: list[Site]) -> Tensor:
        """The weights that one rotation stands before, one below the other."""
        read = [self.floats(site) for site in sites]
        return read[0] if len(read) == 1 else torch.cat(read)
