"""`torch.nn.Linear`: weight stored (out, in)."""

from torch import nn

KIND = "linear"
CLASS = "torch.nn.modules.linear.Linear"
LAYOUT = "out_in"


def owns(module: nn.Module) -> bool:
    """Whether the module is a Linear or a subclass of it."""
    return isinstance(module, nn.Linear)
