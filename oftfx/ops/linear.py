"""A linear layer's product within ops and autograd functions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, bit for bit, whose result is a tensor of its own.

    With a bias and x of three axes PyTorch's is a view of a product of two. Where an autograd
    function gives one, nothing may be done to it in place, as ``nn.ReLU(inplace=True)`` does.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,).
    """
    result = F.linear(x, weight, bias)
    if torch.compiler.is_compiling() or not result._is_view():  # compilers do without in-place ops
        return result
    return result.data
