"""All cores of a model in one launch per forward, instead of one per layer.

    before                                  after, at the start of the model's forward
    layer 1: C_1 = cayley(theta_1) …        C = cayley(stack(theta_1 … theta_n)), once a width
    layer n: C_n = cayley(theta_n) …        layer i: C_i = C[i] …

On a CPU a kernel takes the parameters of all of them where they lie, and nothing is stacked; on a
GPU those of up to eight rotations.

A layer builds its own core wherever it cannot take this one: called by itself, compiled, under
functorch, sharded, or in a region that is recomputed with a graph of its own.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from oftfx import ops
from oftfx.modules import Rotation, built
from oftfx.ops.cayley_each import served
from oftfx.ops.kept import watched
from oftfx.readers import Passes, plain, unchanged, versions
from oftfx.rotations import oft

AT_ONCE = 2**24
"""How many numbers of cores are built together without a gradient: what wide blocks take besides
grows with them, and would be there for all of a model."""


class Bank:
    """Hands every rotation of a model its cores while the model's forward runs.

    Args:
        root: The model whose forward opens the bank.
        rotations: Its rotations.
    """

    def __init__(self, root: nn.Module, rotations: Iterable[Rotation]) -> None:
        self.root = root
        self.rotations = list(rotations)
        self.useful = True
        self.passes = Passes()
        self.readers = {each.readers for each in self.rotations if each.readers is not None}
        for readers in self.readers:
            readers.passes = self.passes
        self.alike = _alike(self.rotations)
        self.handed: list[Given] = []
        self.handles: tuple[RemovableHandle, ...] = (
            root.register_forward_pre_hook(self.fill),
            root.register_forward_hook(self.close, always_call=True),
        )

    def fill(self, root: nn.Module, args: Any) -> None:
        """Builds the cores of every rotation that is in use; a forward pre-hook."""
        # A data-parallel replica calls the same hook with rotations of its own.
        if torch.compiler.is_compiling() or root is not self.root:
            return
        self.passes.begin()
        if not (self.useful and torch.is_grad_enabled()):
            return  # the cores of an earlier forward stay: a region of it may be run again
        handed: list[Given] = []
        for members in self.alike:
            for batch in _batches(members):
                handed += _hand_out(batch)
        self.handed = handed or self.handed

    def close(self, root: nn.Module, args: Any, output: Any) -> None:
        """Ends the forward; a forward hook. Gives up where compiled layers build their own."""
        if torch.compiler.is_compiling() or root is not self.root:
            return
        self.passes.end()
        for readers in self.readers:
            readers.clear() if output is None else readers.end()  # None of a forward that failed
        for given in self.handed:
            given.open = False
        if self.handed:
            self.useful = any(given.taken for given in self.handed)

    def clear(self) -> None:
        """Lets go of the cores handed out before."""
        self.handed.clear()
        for rotation in self.rotations:
            vars(rotation)["given"] = None  # a module's own way of setting attributes is slow

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self.clear()
        for handle in self.handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "handed": []}


class Given:
    """One rotation's share of a bank.

    Attributes:
        tensors: The parameters it was made from, with their versions.
        cores: Its cores, which carry the gradient to the parameters.
        open: Whether the forward it was made for still runs.
        taken: Whether the rotation used it in that forward, with gradient.
    """

    __slots__ = ("cores", "open", "taken", "tensors")

    def __init__(self, tensors: dict[str, Tensor], cores: tuple[Tensor, ...]) -> None:
        self.tensors = versions(tensors)
        self.cores = cores
        self.open = True
        self.taken = False

    def take(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...] | None:
        """The cores, if they may be used now."""
        if not (self.open or (self.taken and _running_again())):
            return None
        if not unchanged(self.tensors, tensors):
            return None
        self.taken = True
        return self.cores


@torch.no_grad()
def build(rotations: Iterable[Rotation]) -> None:
    """Builds the cores of many rotations at once, for calls without a gradient.

    Of those alone whose cores have the same bits together as each by itself.
    """
    for members in _alike(rotations):
        if members[0].method is not oft or oft.series(members[0].spec) is None:
            continue
        for batch in map(list, _batches(members)):
            step = max(1, AT_ONCE // _numbers(batch[0]))
            for some in (batch[i : i + step] for i in range(0, len(batch), step)):
                joined = _cores(some, [rotation.tensors() for rotation in some])
                for rotation, cores in zip(some, joined, strict=True):
                    rotation.keep(cores)


def _numbers(rotation: Rotation) -> int:
    """How many numbers its cores have, where no blocks are shared."""
    return rotation.width * (rotation.block or 1)


def _running_again() -> bool:
    """Whether a checkpointed region is run again to find the tensors that its graph saved.

    Only then does its graph hang on the cores of the forward. Reentrant checkpointing also runs a
    region again while a backward runs, but for a graph of its own, and watches no saved tensors.
    """
    in_backward = torch._C._current_graph_task_id() != -1
    return in_backward and watched()


def _alike(rotations: Iterable[Rotation]) -> list[list[Rotation]]:
    """The rotations by spec and by the shapes of what they train."""
    alike: dict[Any, list[Rotation]] = {}
    for rotation in rotations:
        trained = {n: s for n, s in rotation.shapes.items() if n not in rotation.method.FIXED}
        alike.setdefault((rotation.spec, *trained.items()), []).append(rotation)
    return list(alike.values())


def _batches(members: list[Rotation]) -> Iterable[dict[Rotation, dict[str, Tensor]]]:
    """Those in use that are built together, with their parameters."""
    batches: dict[Any, dict[Rotation, dict[str, Tensor]]] = {}
    for rotation in members:
        if rotation.enabled and (kind := _kind(rotation, tensors := rotation.tensors())):
            batches.setdefault(kind, {})[rotation] = tensors
    return batches.values()


def _kind(rotation: Rotation, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """What rotations of one spec and shape have in common that are built together.

    Nothing unless the parameters are plain tensors: not sharded, flattened, wrapped or on `meta`;
    and one of them is trained.
    """
    kind: list[Any] = [rotation.scaling]
    trained = False
    for name, tensor in tensors.items():
        if not plain(tensor) or tensor.is_meta or tensor.shape != rotation.shapes[name]:
            return ()
        kind += tensor.dtype, tensor.device
        trained |= tensor.requires_grad
    return tuple(kind) if trained else ()


def _hand_out(batch: dict[Rotation, dict[str, Tensor]]) -> list[Given]:
    """Builds the cores of rotations of one spec, shape and kind, and gives each its share."""
    given = list(map(Given, batch.values(), _cores(list(batch), list(batch.values()))))
    for rotation, own in zip(batch, given, strict=True):
        vars(rotation)["given"] = own
    return given


def _cores(members: list[Rotation], held: list[dict[str, Tensor]]) -> Iterable[tuple[Tensor, ...]]:
    spec, scaling, fixed = members[0].spec, members[0].scaling, members[0].method.FIXED
    if len(members) == 1:  # nothing to save but where the forward calls its layer several times
        return [built(spec, held[0], scaling)]
    series = oft.series(spec) if members[0].method is oft and scaling == 1 else None
    if series is not None and served(thetas := [t["theta"] for t in held], *series):
        return zip(ops.cayley_each(thetas, *series), strict=True)
    # What is never trained would be stacked in every forward, only to be handed through.
    stacked = {
        name: tensor if name in fixed else torch.stack([tensors[name] for tensors in held])
        for name, tensor in held[0].items()
    }
    cores = built(spec, stacked, scaling)[len(fixed) :]
    own = ([oft.wide(tensors[n]) for n in members[0].shapes if n in fixed] for tensors in held)
    shares = zip(*(core.unbind() for core in cores), strict=True)
    return [(*first, *share) for first, share in zip(own, shares, strict=True)]
