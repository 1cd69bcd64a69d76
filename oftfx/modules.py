"""Modules that hold the trainable state, and the classes an adapted module takes on.

    Linear                       OFT[Linear]               (a cached subclass of Linear)
      weight, bias                 weight, bias
                                   oft: ModuleDict
                                     default: Rotation
                                       theta

Only the class changes: the object, its names, its parameters and its place in the model stay, so
everything that holds on to the module keeps working, compiled graphs included.
"""

import dataclasses
import functools
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import traceback

from oftfx.ops.factor import Factor
from oftfx.ops.precision import exactly
from oftfx.outputs import Outputs
from oftfx.readers import Readers, autocast_dtype, cast, rotated, traceable
from oftfx.rotations import Method, block_of, method_of
from oftfx.rotations.oft import dropped
from oftfx.sites import fusing
from oftfx.sites.quantised import Fusing
from oftfx.spec import ALL_LINEAR, Spec

Class: TypeAlias = Any  # a subclass of nn.Module; type checkers take classes for unhashable
NOTE = "oftfx_spec"
"""Where the nodes of an exported module keep the spec of their rotation, as JSON."""
CHILD = "oft"
"""Name of the child that holds a module's rotations, by adapter name."""


class Given(Protocol):
    """Cores that were built for a rotation beforehand, with those of others."""

    def take(self, tensors: list[Tensor]) -> tuple[Tensor, ...] | None:
        """The cores, if they are those of these parameters and may be used now."""


class Rotation(Outputs):
    """The trainable rotation of one input, ``x ← x·M``, and what its first reader's outputs train.

    Args:
        spec: Resolved for this site.
        width: Width of the input.
        device: Where the parameters live.
        seed: Seeds the initial values when the spec asks for random ones.
        out: How many outputs its site has.
    """

    def __init__(self, spec: Spec, width: int, device: torch.device, seed: int, out: int) -> None:
        super().__init__(spec, out, device, seed)
        self.width = width
        self.readers: Readers | None = None
        rules: dict[str, Any] = {"targets": ALL_LINEAR, "exclude": (), "overrides": {}}
        self._note = json.dumps(dataclasses.replace(spec, **rules).to_json())
        self.enabled = True
        self.block = block_of(spec)
        self.shapes = self.method.shapes(spec, width)
        for name, shape in self.shapes.items():
            trained = name not in self.method.FIXED
            # What is never trained has no optimizer state either, so it keeps its digits.
            dtype = spec.dtype if trained else torch.promote_types(spec.dtype, torch.float32)
            value = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(value, requires_grad=trained))
        self.given: Given | None = None
        self._cached: tuple[Any, Any, tuple[Tensor, ...]] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the initial values: the identity, or the spec's random start.

        What is never trained depends on the weight: [`fill`][oftfx.modules.Rotation.fill] sets it.
        """
        self.reset_outputs()
        generator = torch.Generator().manual_seed(self.seed)
        self.fill(self.method.start(self.spec, self.width, generator))

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Sets parameters, by name."""
        for name, value in values.items():
            self.get_parameter(name).copy_(value)

    @property
    def method(self) -> Method:
        """The mathematics of its spec."""
        return method_of(self.spec)

    def tensors(self) -> dict[str, Tensor]:
        """The rotation's parameters by name, as whoever manages them left them for this forward."""
        held = self._parameters
        if len(held) == len(self.shapes):
            return held  # type: ignore[return-value]
        return {name: getattr(self, name) for name in self.shapes}

    def cores(self) -> tuple[Tensor, ...]:
        """What the factors are made of; kept between calls while no gradient is wanted."""
        tensors = self.tensors()
        if torch.compiler.is_compiling():
            return built(self.spec, tensors)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()):
            # A training step is coming: it may write to the parameters in ways that leave no
            # trace in their version (`theta.data`), so what was kept is not trusted afterwards.
            self._cached = None
            given = None if self.given is None else self.given.take(list(tensors.values()))
            return given or built(self.spec, tensors)
        if not all(map(traceable, tensors.values())):
            return built(self.spec, tensors)
        inference = torch.is_inference_mode_enabled()
        key = (inference, *((t.data_ptr(), t._version, t.dtype) for t in tensors.values()))
        if self._cached is None or self._cached[0] != key:
            # The storages are kept beside their addresses, which cannot be another's meanwhile.
            held = [tensor.detach() for tensor in tensors.values()]
            self._cached = (key, held, built(self.spec, tensors))
        return self._cached[2]

    def factors(self) -> tuple[Factor, ...]:
        """``M = F_1·F_2·…``, in the order x meets them."""
        return self.method.factors(self.cores(), self.spec)

    def applied(self) -> tuple[Factor, ...]:
        """The factors that a forward applies: while training, without the blocks it drops."""
        return self.method.factors(self._dropped(self.cores()), self.spec)

    def forward(self, x: Tensor) -> Tensor:
        """``x·M``, in autocast's dtype where that is on."""
        if self.readers is None or torch.compiler.is_compiling():
            with self._noted():
                return rotated(x, self.applied())
        return self.readers.rotate(self, x)

    def _noted(self) -> AbstractContextManager[None]:
        """Within it, the nodes of an exported graph remember the spec they came from."""
        return annotated(self._note) if torch.compiler.is_exporting() else nullcontext()

    def _dropped(self, cores: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Multiplicative dropout: in training mode some blocks are the identity."""
        rate = getattr(self.spec, "dropout", 0.0)
        if not (self.training and rate):
            return cores
        return tuple(dropped(core, rate, self.width) for core in cores)

    def turned(self, rows: Tensor) -> Tensor:
        """``W Mᵀ`` factor by factor, in W's dtype or the core's, whichever is wider.

        Args:
            rows: W, (out, in).
        """
        cores = self._dropped(self.cores())
        # torch.promote_types would leave a node of its own in an exported graph.
        rows = rows.to(max(rows.dtype, cores[0].dtype, key=lambda dtype: dtype.itemsize))
        with self._noted():
            for factor in reversed(self.method.factors(cores, self.spec)):
                rows = factor.transposed()(rows)
        return rows

    def extra_repr(self) -> str:
        """The width and the fields that differ from the defaults."""
        fields = ", ".join(f"{k}={v}" for k, v in self.spec.to_json().items() if k != "method")
        return ", ".join(filter(None, (f"width={self.width}", fields)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotation":
        self.given = self._cached = None
        if self.readers is not None:
            self.readers.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "given": None, "_cached": None}


def built(spec: Spec, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """A method's cores, in full precision under autocast too, which would halve their digits."""
    with exactly(next(iter(tensors.values())).device):
        return method_of(spec).cores(tensors, spec)


@contextmanager
def annotated(note: str) -> Iterator[None]:
    """Within it, the nodes of a trace get a note in their metadata, which graph edits keep."""
    tracer = (
        nullcontext() if torch.compiler.is_dynamo_compiling() else traceback.preserve_node_meta()
    )
    with tracer, traceback.annotate({NOTE: note}):
        yield


class SharedRotation(Outputs):
    """Another site's rotation: a reference without names; and what this site's outputs train.

    Args:
        rotation: What the first site of the group holds.
        out: How many outputs this site has.
        device: Where its own parameters live.
        seed: Seeds their initial values.
    """

    def __init__(self, rotation: Rotation, out: int, device: torch.device, seed: int) -> None:
        super().__init__(rotation.spec, out, device, seed)
        self._held = (rotation,)  # a tuple hides the module from the module tree
        self.readers: Readers | None = None

    def reset_parameters(self) -> None:
        """Sets the initial values of its own."""
        self.reset_outputs()

    @property
    def rotation(self) -> Rotation:
        """The rotation that the first site of the group holds."""
        return self._held[0]

    @property
    def enabled(self) -> bool:
        """Whether the shared rotation is in use."""
        return self.rotation.enabled

    def factors(self) -> tuple[Factor, ...]:
        """The factors of the rotation."""
        return self.rotation.factors()

    def forward(self, x: Tensor) -> Tensor:
        """``x·M``."""
        if self.readers is None or torch.compiler.is_compiling():
            return self.rotation(x)
        return self.readers.rotate(self, x)

    def turned(self, rows: Tensor) -> Tensor:
        """``W Mᵀ``."""
        return self.rotation.turned(rows)


class Adapted(nn.Module):
    """What every adapted module is an instance of, besides its own class."""

    oft: nn.ModuleDict
    oft_base: type[nn.Module]
    oft_shadowed: tuple[tuple[str, str], ...] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle names its parts instead.
        return _rebuild, (self.oft_base, self.oft_shadowed), self.__getstate__()


@functools.cache
def rotating(base: Class) -> type[nn.Module]:
    """The subclass of a linear layer's class that rotates its input.

    before                after
    y = base(x)           x = rotate(x, cayley(theta))      per adapter and factor, in order
                          y = base(x)
                          y = scale(y, magnitude, bias)     where the spec asks for it
    """
    layers = fusing(base)

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        used = [rotation for rotation in self.oft.values() if rotation.enabled]
        if layers is not None and (output := _fused(self, layers, used, input)) is not None:
            return output
        for rotation in used:
            input = rotation(input)
        output = base.forward(self, input, *args, **kwargs)
        for rotation in used:
            if rotation.outputs:
                output = rotation.scaled(output, getattr(self, "bias", None))
        return output

    name = f"OFT[{base.__name__}]"
    body = {"forward": forward, "oft_base": base, "__module__": base.__module__}
    return type(name, (Adapted, base), {**body, "__doc__": base.__doc__})


def _fused(module: Any, layers: Fusing, turns: list[Any], x: Tensor) -> Tensor | None:
    """A layer's output where it turns its weight instead of x, in a training step; else None."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    if len(turns) != 1 or not isinstance(turn := turns[0], Rotation | SharedRotation):
        return None  # a calibration's probe wants to see x
    rotation = turn.rotation if isinstance(turn, SharedRotation) else turn
    readers = turn.readers
    if turn.outputs or rotation.block is None or not (readers is None or readers.blocks):
        return None
    outs = (turn.out,) if readers is None else readers.outs
    if not layers.fuses(module, x, autocast_dtype(x) or x.dtype, rotation.block, outs):
        return None
    if readers is not None and layers.DEFERS:
        return layers.rotated_linear(module, *readers.defer(turn, x), deferred=True)
    (factor,) = rotation.applied()
    return layers.rotated_linear(module, cast(x), factor.operands[0], deferred=False)


@functools.cache
def folding(base: Class, shadowed: tuple[tuple[str, str], ...]) -> type[nn.Module]:
    """The subclass of a module's class whose weights read as ``W Mᵀ``, folded on the fly.

    Right however the owner uses the weight; its gradient needs that of the folded weight, so it
    costs more than a rotation where the activation is long.

    Args:
        base: The class.
        shadowed: Name and layout of each weight.
    """

    def folded(name: str, layout: str) -> property:
        def read(self: Any) -> Tensor:
            try:
                weight: Tensor = self._parameters[name]
                for rotations in reversed(self.oft.values()):  # x·R1·R2 folds as W·R2ᵀ·R1ᵀ
                    if name in rotations and rotations[name].enabled:
                        weight = rotations[name].fold(weight, layout).to(weight.dtype)
                return weight
            except AttributeError as error:
                # nn.Module would take it for a missing attribute and answer with the raw weight.
                raise RuntimeError(f"folding {name} failed: {error}") from error

        return property(read)

    name = f"OFT[{base.__name__}]"
    body: dict[str, Any] = {key: folded(key, layout) for key, layout in shadowed}
    body |= {"oft_base": base, "oft_shadowed": shadowed, "__module__": base.__module__}
    return type(name, (Adapted, base), {**body, "__doc__": base.__doc__})


def _rebuild(base: Class, shadowed: tuple[tuple[str, str], ...]) -> nn.Module:
    cls = folding(base, shadowed) if shadowed else rotating(base)
    return cls.__new__(cls)


def bare(module: Adapted) -> None:
    """Gives a module its own class back and drops its rotations."""
    del module._modules[CHILD]
    become(module, module.oft_base)


def hooked(module: nn.Module) -> bool:
    """Whether accelerate wrapped this module's forward, in the way `become` knows."""
    inner = vars(module).get("_old_forward")
    return "_hf_hook" in vars(module) and isinstance(inner, types.MethodType)


def own_forward(module: nn.Module) -> bool:
    """Whether an instance's forward is merely its class's, as accelerate's hooks leave behind."""
    return getattr(vars(module)["forward"], "__func__", None) is type(module).forward


def unhook(module: nn.Module) -> None:
    """Takes accelerate's instance-level forward, or what its hooks left of one, off a module."""
    if "_hf_hook" in vars(module):
        for name in ("_hf_hook", "_old_forward", "forward"):
            vars(module).pop(name, None)
    if "forward" in vars(module) and own_forward(module):
        del vars(module)["forward"]


def become(module: nn.Module, cls: Class) -> None:
    """Gives a module another class, and accelerate's instance-level forward that class's."""
    if "forward" in vars(module) and own_forward(module):
        del vars(module)["forward"]
    module.__class__ = cls
    if hooked(module):
        vars(module)["_old_forward"] = types.MethodType(type(module).forward, module)


def parameter_path(weight: str, name: str, functional: bool = False) -> str:
    """Where a rotation lives: `fc.oft.default` for `fc.weight`, `fc.oft.default.w` for `fc.w`."""
    owner, _, leaf = weight.rpartition(".")
    return ".".join(filter(None, (owner, CHILD, name, leaf if functional else "")))


def is_rotation(parameter: str, name: str | None = None) -> bool:
    """Whether a parameter of this name is a rotation's, of one adapter or of any."""
    which = r"\w+" if name is None else name
    return re.fullmatch(rf"(.+\.)?{CHILD}\.{which}\.(\w+\.)?\w+", parameter) is not None


def site_name(owner: str, parameter: str) -> str:
    """A site's fqn: its weight's name without a trailing ".weight"."""
    return (f"{owner}.{parameter}" if owner else parameter).removesuffix(".weight")


def rotations(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Rotation]]:
    """Every rotation of a model with its site's fqn; of one adapter, or of all."""
    for fqn, module in model.named_modules():
        if not isinstance(module, Adapted):
            continue
        for adapter, held in module.oft.items():
            by_parameter = held.items() if isinstance(held, nn.ModuleDict) else [("weight", held)]
            for parameter, rotation in by_parameter:
                if name in (None, adapter) and isinstance(rotation, Rotation):
                    yield site_name(fqn, parameter), rotation


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Within it, the model computes what its base computes, bit for bit.

    Args:
        model: An adapted nn.Module, or anything that contains one.
        name: One adapter; None for all.
    """
    held = [(rotation, rotation.enabled) for _, rotation in rotations(model, name)]
    try:
        for rotation, _ in held:
            rotation.enabled = False
        yield
    finally:
        for rotation, enabled in held:
            rotation.enabled = enabled
