"""One weight to fold."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oftfx.errors import MergeError
from oftfx.ops.factor import Factor
from oftfx.ops.fold import folded
from oftfx.ops.rotate import ROTATE

BLOCK = 2**26
"""How many elements are folded at once: 256 MiB where they are cast to float32.

Less would keep the host busier with launches than the device with bytes.
"""


@dataclass(frozen=True)
class Fold:
    """One weight to fold: the factors in the order x meets them, and those of the outputs."""

    fqn: str
    weight: Tensor
    out_in: bool
    factors: Sequence[Factor]
    dtype: torch.dtype
    """What the folded weight is stored in."""
    scales: Sequence[Factor] = ()

    def check(self) -> None:
        """That it can be folded, as far as that is known without waiting for the device.

        Raises:
            MergeError: It has no values, or is no float.
        """
        if self.weight.device.type == "meta":
            raise MergeError(
                f"{self.fqn}: its weight is on `meta` (not loaded, or offloaded); load the whole "
                "model onto a device before merging."
            )
        if not self.weight.is_floating_point():
            raise MergeError(
                f"{self.fqn}: its weight is quantised, which this version folds in an nn.Module "
                "only: merge that and export it anew, or keep the rotation in the graph."
            )

    def folded(self, dtype: torch.dtype) -> Tensor:
        """``diag(1 + m)·W Mᵀ`` in (out, in), computed in this dtype."""
        return self.turned(self.weight if self.out_in else self.weight.mT, dtype)

    def turned(self, rows: Tensor, dtype: torch.dtype, which: slice = slice(None)) -> Tensor:
        """``(1 + m)·w Mᵀ`` for rows w of the weight, computed in this dtype."""
        rows = rows.to(dtype)
        for factor in reversed(self.factors):
            rows = factor.transposed()(rows)
        return self.scaled(rows.mT, which).mT

    def scaled(self, outputs: Tensor, which: slice = slice(None)) -> Tensor:
        """Outputs (..., out) of the matmul, of these rows of the weight, with their magnitudes."""
        for scale in self.scales:
            magnitude, *rest = scale.operands
            outputs = scale.op(outputs, magnitude[which], *rest)
        return outputs

    def run(self) -> Tensor:
        """Folds, block by block, without waiting for the device.

        Returns:
            The weight to store, a tensor of its own, in the weight's layout.
        """
        into = torch.empty(self.weight.shape, dtype=self.dtype, device=self.weight.device)
        dtype, core = torch.promote_types(self.wide(), self.dtype), self._core()
        for old, new, which in self.blocks(into):
            if core is None or torch.promote_types(old.dtype, core.dtype) != dtype:
                new.copy_(self.turned(old, dtype, which))
            else:
                folded(old, core, new.dtype, into=new)
        return into

    def _core(self) -> Tensor | None:
        """Of the one block rotation that folds in one pass, if that is all there is to fold."""
        if len(self.factors) != 1 or self.scales or self.factors[0].op is not ROTATE:
            return None
        core, *strides = self.factors[0].operands
        return core if strides in ([], [1]) else None

    def blocks(self, stored: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """The weight's rows, (out, in), beside them a stored weight's, and which they are."""
        pairs = [tensor.detach() for tensor in (self.weight, stored)]
        old, new = (tensor if self.out_in else tensor.mT for tensor in pairs)
        step = max(1, BLOCK * old.shape[0] // max(1, old.numel()))
        for begin in range(0, old.shape[0], step):
            which = slice(begin, begin + step)
            yield old[which], new[which], which

    def wide(self) -> torch.dtype:
        """The widest of the weight's dtype and the factors'."""
        dtypes = (tensor.dtype for tensor in self.tensors())
        return functools.reduce(torch.promote_types, dtypes, self.weight.dtype)

    def tensors(self) -> list[Tensor]:
        """What its factors are made of."""
        operands = (each for factor in (*self.factors, *self.scales) for each in factor.operands)
        return [operand for operand in operands if isinstance(operand, Tensor)]


def check_finite(named: Iterable[tuple[str, Sequence[Tensor]]]) -> None:
    """That rotations are finite; waits for the device once.

    Args:
        named: Sites, and what their factors are made of.

    Raises:
        MergeError: One is not.
    """
    names, tensors = zip(*((fqn, each) for fqn, made_of in named for each in made_of), strict=True)
    # One call for those of a whole model, which are many and small.
    largest = [norm[None] for norm in torch._foreach_norm(tensors, torch.inf)]
    for fqn, (number,) in zip(names, read(largest), strict=True):
        if not math.isfinite(number):
            raise MergeError(f"{fqn}: its rotation is not finite; training diverged there.")


def read(rows: Sequence[Tensor]) -> list[list[float]]:
    """Rows of numbers as Python's, waiting once for each device that they are on."""
    by_device: dict[torch.device, list[int]] = {}
    for i, row in enumerate(rows):
        by_device.setdefault(row.device, []).append(i)
    found: dict[int, list[float]] = {}
    for members in by_device.values():
        flat = iter(torch.cat([rows[i] for i in members]).tolist())
        found.update((i, [next(flat) for _ in range(len(rows[i]))]) for i in members)
    return [found[i] for i in range(len(rows))]
