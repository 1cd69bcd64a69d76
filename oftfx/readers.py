"""Layers that read one tensor rotate it together, when the first of them asks.

    before                          after
    x_q = rotate(x, C_q)            x_q, x_k, x_v = rotate_group(x, [C_q, C_k, C_v])
    x_k = rotate(x, C_k)
    x_v = rotate(x, C_v)

and layers that share a rotation use one rotated tensor. A compiled graph gets the same from the
pass `group`. Where each turns its own weight instead, they have the gradients in common alone.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from oftfx import ops
from oftfx.ops.factor import Factor
from oftfx.ops.kept import watched
from oftfx.ops.rotate import ROTATE
from oftfx.through import through

Versions: TypeAlias = dict[str, tuple[Tensor, int, bool]]


class Turns(Protocol):
    """A rotation, as far as its readers are concerned."""

    enabled: bool
    block: int | None
    scaling: float
    training: bool

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters."""

    def applied(self) -> tuple[Factor, ...]:
        """The factors that this forward applies, in the order x meets them."""


class Passes:
    """The forwards of a model.

    Attributes:
        running: Whether one runs.
        number: Of the last one.
    """

    def __init__(self) -> None:
        self.running = False
        self.number = 0

    def begin(self) -> None:
        """Another one runs from here on."""
        self.running = True
        self.number += 1

    def end(self) -> None:
        """It is over."""
        self.running = False


class Kept(NamedTuple):
    """What the first reader of a tensor left for the others.

    Attributes:
        x: The tensor they read.
        state: Its version, the modes and the forward it was read in, and how it was turned.
        held: For each rotation, the parameters it had, with their versions.
        turned: For each rotation, what its readers get.
        served: The readers that have had theirs.
    """

    x: Tensor
    state: Any
    held: list[Versions]
    turned: Sequence[Any]
    served: set[nn.Module]


class Readers:
    """The readers of one input tensor, each with the rotation it turns it by.

    Args:
        rotations: By reader; one that several share, or one each.
        near: Whether they are parts of one module, whose forward reads the tensor. Others may be in
            regions that checkpointing runs again one by one, and finds to be what they were.

    Attributes:
        turns: The rotations.
        places: By reader, that of its rotation among them.
        blocks: Whether each turns blocks.
        outs: How many outputs each reader has; none where they share a rotation.
        passes: The forwards of the model that they are in.
    """

    def __init__(self, rotations: dict[Any, Turns], near: bool = True) -> None:
        self.near = near
        self.turns = list(dict.fromkeys(rotations.values()))
        self.places = {reader: self.turns.index(turn) for reader, turn in rotations.items()}
        self.blocks = all(turn.block is not None for turn in self.turns)
        own = len(self.turns) == len(rotations)
        self.outs = tuple(reader.out for reader in rotations) if own else ()
        self.useful = True
        self.passes = Passes()
        self._kept: Kept | None = None

    def rotate(self, reader: Any, x: Tensor) -> Tensor:
        """The reader's rotated x, computed once for all that read it in this forward."""
        result: Tensor = self._read(reader, x, together)
        return result

    def defer(self, reader: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """What [`deferred`][oftfx.readers.deferred] gives the reader, likewise."""
        result: tuple[Tensor, Tensor] = self._read(reader, x, deferred)
        return result

    def _read(self, reader: Any, x: Tensor, turn: Callable[..., Sequence[Any]]) -> Any:
        place, dtype = self.places.get(reader), matmul_dtype(x)
        if place is None:  # a shallow copy, such as a data-parallel replica, of a reader
            return turn(x, [reader.rotation], dtype)[0]
        own = self.turns[place]
        if not self.near and watched():
            return turn(x, [own], dtype)[0]
        version = None if x.is_inference() else x._version
        running = self.passes.running
        # What is left in one forward is nothing to another: its graph may be gone by then.
        during = self.passes.number if running else self._modes()
        state = (version, x.requires_grad, torch.is_grad_enabled(), dtype, turn, running, during)
        kept = self._kept
        if (
            kept is None
            or kept.x is not x
            or kept.state != state
            or reader in kept.served
            or not unchanged(kept.held[place], own.tensors())
        ):
            # A reader that asks again is in another forward, whose graph must be its own.
            self.end()
            held = self._held(x)
            if held is None:
                return turn(x, [own], dtype)[0]
            self._kept = kept = Kept(x, state, held, turn(x, self.turns, dtype), set())
            if not running:
                self._until_backward(kept.turned)
        kept.served.add(reader)
        if len(kept.served) == len(self.places):
            self._kept = None
        return kept.turned[place]

    def _modes(self) -> tuple[Any, ...]:
        """What else the rotations depend on."""
        return tuple((turn.scaling, turn.training) for turn in self.turns)

    def _until_backward(self, turned: Sequence[Any]) -> None:
        """Where no forward's end tells, what was kept goes when its graph is used up."""
        mine = weakref.ref(self)

        def clear(grads: Any) -> None:
            if (readers := mine()) is not None:
                readers.clear()

        for each in turned:
            out = each if isinstance(each, Tensor) else each[0]
            if out.grad_fn is not None:
                out.grad_fn.register_prehook(clear)

    def _held(self, x: Tensor) -> list[Versions] | None:
        """The parameters of each rotation; None where no more is computed than is asked for."""
        several = len(self.turns) > 1
        # A checkpointed region that runs again must do what it did, whatever came of it meanwhile.
        if (several and not self.useful and not watched()) or not traceable(x):
            return None
        held = []
        for turn in self.turns:
            if several and not turn.enabled:
                return None
            tensors = turn.tensors()
            for tensor in tensors.values():
                if not traceable(tensor):
                    return None
            held.append(versions(tensors))
        return held

    def end(self) -> None:
        """Whoever has not come by now for what was kept reads something else."""
        if self._kept is not None:
            if torch._C._current_graph_task_id() == -1 and not watched():
                self.useful = False
            self._kept = None

    def clear(self) -> None:
        """Lets go of what was kept."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": None}


def versions(tensors: Mapping[str, Tensor]) -> Versions:
    """A rotation's parameters with their versions, and whether they are trained."""
    return {name: (each, each._version, each.requires_grad) for name, each in tensors.items()}


def unchanged(held: Versions, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a rotation has the parameters that it had, and nothing was written to them."""
    for name, now in tensors.items():
        tensor, version, trained = held[name]
        if now is not tensor or now._version != version or now.requires_grad != trained:
            return False
    return True


def together(x: Tensor, turns: list[Any], dtype: torch.dtype) -> Sequence[Tensor]:
    """``x·M`` for several M, in one op where each is one block rotation of the same blocks."""
    applied = [turn.applied() for turn in turns]
    cores = _alike(applied)
    if cores and (outs := rotated_through(x, cores, dtype)) is not None:
        return outs
    x = x if x.dtype is dtype else x.to(dtype)
    return _turned(x, cores) if cores else [_applied(x, own) for own in applied]


def rotated_through(
    x: Tensor, cores: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, ...] | None:
    """``x·M`` of block rotations, with a backward that goes on through what made x, if it can."""
    return through(x, cores, dtype, _turned)


def _turned(x: Tensor, cores: list[Tensor]) -> list[Tensor]:
    return ops.rotate_group(x, cores) if len(cores) > 1 else [ops.rotate(x, cores[0])]


def _alike(applied: list[tuple[Factor, ...]]) -> list[Tensor]:
    """The cores, where each is one block rotation of the same blocks; else none."""
    cores: list[Tensor] = []
    for factors in applied:
        if len(factors) != 1 or factors[0].op is not ROTATE or len(factors[0].operands) > 1:
            return []
        operands = factors[0].operands
        if cores and operands[0].shape != cores[0].shape:
            return []
        cores.append(operands[0])
    return cores


def deferred(x: Tensor, turns: list[Any], dtype: torch.dtype) -> Sequence[tuple[Tensor, Tensor]]:
    """For each block rotation, x itself and the core by which its reader turns its own weight."""
    cores = [turn.applied()[0].operands[0] for turn in turns]
    outs = deferred_through(x, cores, dtype) or ops.defer(x.to(dtype), cores)
    return list(zip(outs, (core.detach() for core in cores), strict=True))


def deferred_through(
    x: Tensor, cores: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, ...] | None:
    """[`defer`][oftfx.ops.defer] with a backward that goes on through what made x, if it can."""
    return through(x, cores, dtype, _as_it_is)


def _as_it_is(x: Tensor, cores: list[Tensor]) -> list[Tensor]:
    return [x.detach() for _ in cores]


def rotated(x: Tensor, factors: tuple[Factor, ...]) -> Tensor:
    """``x·F_1·F_2·…``, in autocast's dtype where that is on."""
    return _applied(cast(x), factors)


def _applied(x: Tensor, factors: tuple[Factor, ...]) -> Tensor:
    for factor in factors:
        x = factor(x)
    return x


def cast(x: Tensor) -> Tensor:
    """Casts as the matmul would anyway: rotating fewer bytes gives the same product."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matmul reads x in: autocast's where that is on."""
    return autocast_dtype(x) or x.dtype


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast x to before a matmul; None where it is off."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = "cuda" if x.is_cuda else x.device.type  # which takes as long as all that follows
    if device == "meta":  # which has no autocast, not even to ask about
        return None
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def plain(tensor: Tensor) -> bool:
    """Whether a tensor is what it seems: not sharded, wrapped, quantised or under a transform."""
    return type(tensor) in (Tensor, nn.Parameter) and traceable(tensor)


def traceable(tensor: Tensor) -> bool:
    """Whether a tensor has a version that tells its changes: not in inference mode or vmap."""
    if tensor.is_inference():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not (torch._C._are_functorch_transforms_active() and wrapped(tensor))
