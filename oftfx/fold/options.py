"""What a merged model with quantised layers is to be."""

from dataclasses import dataclass

import torch

from oftfx.errors import MergeError


@dataclass(frozen=True)
class Options:
    """The options of [`merge`][oftfx.merge] that are for quantised layers.

    Attributes:
        dtype: Of their floats; None for bfloat16, and to leave them where none is adapted.
        requantize: Whether they keep their format.
    """

    dtype: torch.dtype | None = None
    requantize: bool = False

    def check(self, quantised: bool) -> None:
        """That they fit each other, and a model that has quantised layers or none.

        Raises:
            MergeError: They do not.
        """
        if (self.dtype is not None or self.requantize) and not quantised:
            raise MergeError(
                "dtype and requantize are for quantised layers, and the model has none."
            )
        if self.dtype is None:
            return
        if self.requantize:
            raise MergeError(
                "requantize=True keeps the format that each layer has: leave dtype out."
            )
        if not (self.dtype.is_floating_point and self.dtype.itemsize > 1):
            raise MergeError(f"dtype={self.dtype}: must be a floating dtype of ≥ 16 bits.")

    def to_floats(self, adapted: bool) -> bool:
        """Whether all quantised layers become floats, given whether one of them is adapted."""
        return not self.requantize and (self.dtype is not None or adapted)

    @property
    def floats(self) -> torch.dtype:
        """The dtype of what becomes floats."""
        return self.dtype or torch.bfloat16
