"""`torch.nn.Embedding`: no matmul; what it looks up is rotated, ``W[i]·M``, and folds as ``W·M``.

The weight that it may be tied to, the output head's, stays as it is.
"""

from torch import nn

from oftfx.sites.naming import class_of

KIND = "embedding"


def owns(module: nn.Module) -> bool:
    """Whether the module looks rows up as an Embedding does, and leaves them as they are."""
    plain = isinstance(module, nn.Embedding) and class_of(module).forward is nn.Embedding.forward
    return plain and module.max_norm is None
