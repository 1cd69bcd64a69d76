"""`transformers.pytorch_utils.Conv1D`, GPT-2's linear: weight stored (in, out)."""

from torch import nn

KIND = "conv1d"
CLASS = "transformers.pytorch_utils.Conv1D"
LAYOUT = "in_out"


def owns(module: nn.Module) -> bool:
    """Whether the module is a Conv1D, told by name so that transformers is not imported."""
    return any(f"{cls.__module__}.{cls.__name__}" == CLASS for cls in type(module).__mro__)
