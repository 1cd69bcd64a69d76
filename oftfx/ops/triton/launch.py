"""One way to launch every kernel, with little Python around it.

A small model's step is bound by launches, and finding the compiled code for a set of arguments
costs Triton more time than a small kernel runs. A problem of known sizes is therefore looked up
once and its compiled code kept.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Launch:
    """A kernel with everything but its tensors.

    Args:
        kernel: A jitted kernel, whose tensors come first and compile-time constants last. Its
            numbers are annotated as what they are in it, tensors: of an ``int`` Triton takes the
            type for given and does not compile for a stride of 1, so that nothing is known to lie
            side by side.
        programs: How many programs to run.
        numbers: Its run-time numbers, in order.
        constants: Its compile-time constants, in order.
        options: ``num_warps`` and the like.
    """

    __slots__ = ("_compiled", "_grid", "_kernel", "_options", "_rest")

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[int, ...],
        constants: tuple[int | str, ...],
        **options: int,
    ) -> None:
        self._kernel = kernel
        self._grid = (programs, 1, 1)
        self._rest = (*numbers, *constants)
        self._options = options
        self._compiled: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor) -> None:
        """Runs it on tensors that always have the same dtypes, layouts and device."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        aligned = True
        for address in addresses:
            aligned &= not address & 15
        if aligned and self._compiled is not None:
            self._compiled(*addresses, *self._rest)
            return
        code = self._kernel[self._grid](*tensors, *self._rest, **self._options)
        # Triton compiles other code for other alignments; the interpreter compiles none.
        if aligned and code is not None:
            self._compiled = code[self._grid]
