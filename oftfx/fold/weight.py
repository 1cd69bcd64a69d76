"""One weight to fold, and what folding it costs."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oftfx.errors import MergeError
from oftfx.fold.report import MergedSite
from oftfx.ops.factor import Factor


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
        """That it can be folded.

        Raises:
            MergeError: It has no values, is no float, or its rotation is not finite.
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
        if not all(torch.isfinite(tensor).all() for tensor in self._tensors()):
            raise MergeError(f"{self.fqn}: its rotation is not finite; training diverged there.")

    def folded(self, dtype: torch.dtype) -> Tensor:
        """``diag(1 + m)·W Mᵀ`` in (out, in), computed in this dtype."""
        rows = (self.weight if self.out_in else self.weight.mT).to(dtype)
        for factor in reversed(self.factors):
            rows = factor.transposed()(rows)
        for scale in self.scales:
            rows = scale(rows.mT).mT
        return rows

    def run(self) -> Tensor:
        """The weight to store, in its own layout and dtype."""
        rows = self.folded(torch.promote_types(self._wide(), self.dtype))
        return (rows if self.out_in else rows.mT).to(self.dtype).contiguous()

    def survived(self, stored: Tensor) -> float:
        """The share of the adaptation that a stored weight kept, as `MergedSite` defines it."""
        exact = self.folded(self._wide())
        change = exact - self.weight
        return float(((stored - self.weight) * change).sum() / change.square().sum())

    def cost(
        self, stored: Tensor, untied: bool = False, survived: float | None = None
    ) -> MergedSite:
        """What storing this weight cost, measured on 16 random inputs."""
        exact = self.folded(torch.float64)
        out_in = self.out_in
        before, after = (w if out_in else w.mT for w in (self.weight, stored))
        seed = torch.Generator().manual_seed(0)
        x = torch.randn(16, before.shape[1], generator=seed).to(before)
        rotated = x
        for factor in self.factors:
            rotated = factor(rotated)
        output = rotated @ before.mT
        for scale in self.scales:
            output = scale(output)
        unmerged = output.double()
        return MergedSite(
            self.fqn,
            output_error=relative_error((x @ after.to(x.dtype).mT).double() - unmerged, unmerged),
            orthogonality_error=max(float(factor.defect()) for factor in self.factors),
            rounding_error=relative_error(after.double() - exact, exact),
            untied=untied,
            survived=survived,
        )

    def _wide(self) -> torch.dtype:
        """The widest of the weight's dtype and the factors'."""
        dtypes = (tensor.dtype for tensor in self._tensors())
        return functools.reduce(torch.promote_types, dtypes, self.weight.dtype)

    def _tensors(self) -> Iterator[Tensor]:
        for factor in (*self.factors, *self.scales):
            yield from (operand for operand in factor.operands if isinstance(operand, Tensor))


def relative_error(difference: Tensor, reference: Tensor) -> float:
    """The difference's 2-norm in terms of the reference's."""
    return float(difference.norm() / reference.norm().clamp_min(1e-300))
