"""The trainable state of one adapter at one site."""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.fx import traceback
from torch.optim.optimizer import register_optimizer_step_post_hook

from oftfx.ops.factor import Factor
from oftfx.ops.precision import exactly
from oftfx.outputs import Outputs
from oftfx.readers import Readers, matmul_dtype, rotated, together, traceable
from oftfx.rotations import Method, block_of, method_of, scaled
from oftfx.rotations.oft import dropped
from oftfx.spec import Spec

NOTE = "oftfx_spec"
"""Where the nodes of an exported module keep the spec of their rotation, as JSON."""
_KNOWN: dict[str, tuple[Spec, tuple[str, ...]]] = {}
"""Specs by that JSON, with the names of a rotation's parameters: a compiled layer then checks one
text of each rotation instead of all that follows from it."""


class Given(Protocol):
    """Cores that were built for a rotation beforehand, with those of others."""

    def take(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...] | None:
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
        self.enabled = True
        self.block = block_of(spec)
        self.shapes = self.method.shapes(spec, width)
        # One object for all of one spec, which is compared without reading it.
        self._note = sys.intern(json.dumps(spec.without_rules().to_json()))
        self._make_known()
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
    def rotation(self) -> Self:
        """Itself, as a [`SharedRotation`][oftfx.modules.SharedRotation] has another's."""
        return self

    @property
    def method(self) -> Method:
        """The mathematics of its spec."""
        return method_of(self.spec)

    def _make_known(self) -> None:
        _KNOWN[self._note] = self.spec, tuple(self.shapes)

    def tensors(self) -> dict[str, Tensor]:
        """The rotation's parameters by name, as whoever manages them left them for this forward."""
        held = self._parameters
        if len(held) == len(self.shapes):
            return held  # type: ignore[return-value]
        return {name: getattr(self, name) for name in self.shapes}

    def cores(self) -> tuple[Tensor, ...]:
        """What the factors are made of; kept between calls while no gradient is wanted."""
        return self._made()[1]

    def _made(self) -> tuple[Spec, tuple[Tensor, ...]]:
        """Its spec, or while compiling one that is equal but for its rules; and its cores."""
        if torch.compiler.is_compiling():
            spec, names = _KNOWN[self._note]
            tensors = {name: getattr(self, name) for name in names}
            return spec, built(spec, tensors, self.scaling)
        return self.spec, self._cores(self.tensors())

    def _cores(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors.values()):
            # A training step is coming: it may write to the parameters in ways that leave no
            # trace in their version (`theta.data`), so what was kept is not trusted afterwards.
            if self._cached is not None:  # a module's own way of setting attributes is slow
                self._cached = None
            given = None if self.given is None else self.given.take(tensors)
            return given or built(self.spec, tensors, self.scaling)
        if not all(map(traceable, tensors.values())):
            return built(self.spec, tensors, self.scaling)
        if self._cached is None or self._cached[0] != self._key(tensors):
            self.keep(built(self.spec, tensors, self.scaling))
        assert self._cached is not None
        return self._cached[2]

    def keep(self, cores: tuple[Tensor, ...]) -> None:
        """Keeps the cores of its parameters as they are now for calls without a gradient."""
        _count_steps()
        tensors = self.tensors()
        # The storages are kept beside their addresses, which cannot be another's meanwhile.
        held = [tensor.detach() for tensor in tensors.values()]
        self._cached = (self._key(tensors), held, cores)

    def _key(self, tensors: dict[str, Tensor]) -> Any:
        """What cores that are kept depend on."""
        states = ((t.data_ptr(), t._version, t.dtype) for t in tensors.values())
        return torch.is_inference_mode_enabled(), self.scaling, _Steps.taken, *states

    def factors(self) -> tuple[Factor, ...]:
        """``M = F_1·F_2·…``, in the order x meets them."""
        return self.method.factors(self.cores(), self.spec)

    def applied(self) -> tuple[Factor, ...]:
        """The factors that a forward applies: while training, without the blocks it drops."""
        spec, cores = self._made()
        return method_of(spec).factors(self._dropped(cores, spec), spec)

    def forward(self, x: Tensor) -> Tensor:
        """``x·M``, in autocast's dtype where that is on."""
        if not torch.compiler.is_compiling():
            if self.readers is not None:
                return self.readers.rotate(self, x)
            return together(x, [self], matmul_dtype(x))[0]
        with self._noted():
            return rotated(x, self.applied())

    def _noted(self) -> AbstractContextManager[None]:
        """Within it, the nodes of an exported graph remember the spec they came from."""
        return annotated(self._note) if torch.compiler.is_exporting() else nullcontext()

    def _dropped(self, cores: tuple[Tensor, ...], spec: Spec) -> tuple[Tensor, ...]:
        """Multiplicative dropout: in training mode some blocks are the identity."""
        rate = getattr(spec, "dropout", 0.0)
        if not (rate and self.training):
            return cores
        return tuple(dropped(core, rate, self.width) for core in cores)

    def turned(self, rows: Tensor) -> Tensor:
        """``W Mᵀ`` factor by factor, in W's dtype or the core's, whichever is wider.

        Args:
            rows: W, (out, in).
        """
        spec, cores = self._made()
        cores = self._dropped(cores, spec)
        # torch.promote_types would leave a node of its own in an exported graph.
        rows = rows.to(max(rows.dtype, cores[0].dtype, key=lambda dtype: dtype.itemsize))
        with self._noted():
            for factor in reversed(method_of(spec).factors(cores, spec)):
                rows = factor.transposed()(rows)
        return rows

    def extra_repr(self) -> str:
        """The width and the fields that differ from the defaults."""
        fields = ", ".join(f"{k}={v}" for k, v in self.spec.to_json().items() if k != "method")
        return ", ".join(filter(None, (f"width={self.width}", fields)))

    def train(self, mode: bool = True) -> Self:
        """As any module; what is kept goes, since averaged weights are often swapped in before."""
        self._cached = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.given = self._cached = None
        if self.readers is not None:
            self.readers.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "given": None, "_cached": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_known()


class _Steps:
    """How many steps optimizers took; a fused one's leaves no trace in a parameter's version."""

    taken = 0


@functools.cache
def _count_steps() -> None:
    """From here on; once is enough."""
    register_optimizer_step_post_hook(_stepped)


def _stepped(*given: Any) -> None:
    if not torch.compiler.is_compiling():  # which would guard the number
        _Steps.taken += 1


def built(spec: Spec, tensors: Mapping[str, Tensor], scale: float = 1.0) -> tuple[Tensor, ...]:
    """A method's cores, in full precision under autocast too, which would halve their digits.

    Args:
        spec: Of the method.
        tensors: The parameters, of one site or stacked.
        scale: How far along the rotation, as for [`oftfx.scale`][oftfx.scale].
    """
    with exactly(next(iter(tensors.values())).device):
        return method_of(spec).cores(scaled(tensors, spec, scale), spec)


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

    def applied(self) -> tuple[Factor, ...]:
        """The factors that a forward applies."""
        return self.rotation.applied()

    def forward(self, x: Tensor) -> Tensor:
        """``x·M``."""
        if torch.compiler.is_compiling() or self.readers is None:
            return self.rotation(x)
        return self.readers.rotate(self, x)

    def turned(self, rows: Tensor) -> Tensor:
        """``W Mᵀ``."""
        return self.rotation.turned(rows)
