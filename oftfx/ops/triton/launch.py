"""One way to launch every kernel, with little Python around it.

A small model's step is bound by launches, and finding the compiled code for a set of arguments
costs Triton more time than a small kernel runs. A problem of known sizes is therefore looked up
once, its compiled code kept, and launched by the C function that PyTorch has for its own compiled
graphs: Triton's way there asks for the device, the stream and hooks each time, which was measured
to take 8 µs of a rotation's 34. As in those graphs, Python's lock is held while a launch waits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs

_C: Any = torch._C
_TYPES = {"i32": "i", "i64": "l"}
"""How PyTorch's launcher calls the types of Triton's numbers."""


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
        self._compiled: Callable[[list[int]], None] | None = None

    def __call__(self, *tensors: Tensor) -> None:
        """Runs it on tensors that always have the same dtypes, layouts and device."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        aligned = True
        for address in addresses:
            aligned &= not address & 15
        if aligned and self._compiled is not None:
            self._compiled(addresses)
            return
        code = self._kernel[self._grid](*tensors, *self._rest, **self._options)
        # Triton compiles other code for other alignments; the interpreter compiles none.
        if aligned and code is not None:
            self._compiled = _direct(code, self._grid[0], tensors, self._rest)


def _direct(
    code: Any, programs: int, tensors: Sequence[Tensor], rest: tuple[int | str, ...]
) -> Callable[[list[int]], None]:
    """What runs compiled code, given the addresses of tensors like these.

    Triton's own way where the code needs more than its arguments, or a hook asks by now to see
    launches; one that is set later does not see those of this code.
    """
    meta, source = code.metadata, code.src
    launch = getattr(getattr(_C, "_StaticCudaLauncher", None), "_launch_kernel", None)
    scratch = [getattr(meta, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    plain = meta.num_ctas == 1 and not (meta.launch_cooperative_grid or meta.launch_pdl)
    plain &= not getattr(meta, "instrumentation_mode", "")
    # Of a number that it compiled for, and of a constant, the code has no argument.
    types = [source.signature[name] for name in source.fn.arg_names[len(tensors) :]]
    known = set(types) <= {*_TYPES, "constexpr"}
    if launch is None or any(scratch) or not (plain and known) or _hooked():
        run = code[programs, 1, 1]
        return lambda addresses: run(*addresses, *rest)
    given = [(_TYPES[t], x) for t, x in zip(types, rest, strict=True) if t != "constexpr"]
    empty = [None for size in scratch if size is not None]  # an argument, though there is none
    kinds = "".join(("O" * len(tensors), *(kind for kind, _ in given), "O" * len(empty)))
    last = (*(number for _, number in given), *empty)
    warps, shared, device = meta.num_warps, meta.shared, tensors[0].device.index

    def run_directly(addresses: list[int]) -> None:
        stream = _C._cuda_getCurrentRawStream(device)
        # Of `code` and not of its number alone, for as long as it is held it stays loaded.
        launch(code.function, programs, 1, 1, warps, shared, kinds, (*addresses, *last), stream)

    return run_directly


def _hooked() -> bool:
    """Whether somebody asks Triton to tell of launches, as its profiler does."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)
