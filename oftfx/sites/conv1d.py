"""`transformers.pytorch_utils.Conv1D`, GPT-2's linear: weight stored (in, out)."""

from torch import nn

from oftfx.sites.matmul import Layout

KIND = "conv1d"
CLASS = "transformers.pytorch_utils.Conv1D"
LAYOUT: Layout = "in_out"


def owns(module: nn.Module) -> bool:
    """Whether the module multiplies as a Conv1D does; told by name, without transformers."""
    cls = getattr(module, "oft_base", type(module))
    forward = getattr(cls, "forward", None)
    return f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}" == (
        f"{CLASS}.forward"
    )
