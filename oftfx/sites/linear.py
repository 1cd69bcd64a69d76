"""`torch.nn.Linear`: weight stored (out, in)."""

from torch import nn

from oftfx.sites.matmul import Layout

KIND = "linear"
CLASS = "torch.nn.modules.linear.Linear"
LAYOUT: Layout = "out_in"


def owns(module: nn.Module) -> bool:
    """Whether the module multiplies as a Linear does.

    A subclass with a forward of its own may read its input twice, so its weight is folded on the
    fly instead.
    """
    cls = getattr(module, "oft_base", type(module))
    return isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward
