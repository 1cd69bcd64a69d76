"""`transformers.pytorch_utils.Conv1D`, GPT-2's linear: weight stored (in, out)."""

from torch import nn

from oftfx.sites.matmul import Layout
from oftfx.sites.naming import forward_of

KIND = "conv1d"
CLASS = "transformers.pytorch_utils.Conv1D"
LAYOUT: Layout = "in_out"


def owns(module: nn.Module) -> bool:
    """Whether the module multiplies as a Conv1D does."""
    return forward_of(module) == f"{CLASS}.forward"
