"""Probes: while a model runs, what passes at its sites, shown to sketches.

    before                          after
    y = linear(x, W, b)             x_p = probe(x)              shows x and, going back, dx
                                    y   = linear(x_p, W, b)     its output hook shows dy

Nothing is computed differently, no flag is needed on a parameter, and a weight may be stored in
any way. A weight that is used without a layer is probed itself.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from oftfx import insert
from oftfx.attach import displace, place
from oftfx.host import host_of
from oftfx.plan import Plan, Site
from oftfx.rotations.sketches import Sketch

ROWS = 4096
"""Of an activation, how many are in float32 at a time."""

_NAME = "oftfx_probe"


@contextmanager
def probed(model: nn.Module, plan: Plan, probes: "Sequence[tuple[Site, Probe]]") -> Iterator[None]:
    """Within it, probes stand where a plan's rotations would, after those that are there."""
    if isinstance(model, fx.GraphModule):
        with _in_graph(model, plan, probes):
            yield
    else:
        with _in_modules(model, probes):
            yield


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Train mode with everything frozen; all is as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # Statistics that a forward in train mode moves; larger buffers are weights and tables.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.dim() < 2]
    try:
        for module, _ in modes:
            module.training = True  # `train()` of an exported module refuses
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


class _Tap(torch.autograd.Function):
    """The identity, whose backward shows the gradient that passes."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor, sink: Callable[[Tensor], None]) -> Tensor:
        ctx.sink = sink
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        ctx.sink(grad)
        return None, grad, None


class Probe(nn.Module):
    """Stands where a site's rotation will: maps nothing, and shows x and gradients to a sketch."""

    enabled = True
    outputs = ()  # it scales none

    def __init__(self, sketch: Sketch, reader: str, layout: str) -> None:
        super().__init__()
        self.sketch = sketch
        self.reader = reader
        self.layout = layout
        self.output = _Output(self)
        self.x: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The matmul's input, as it is."""
        if self.sketch.NEEDS_OUTPUT:
            self.x = x.detach()
            return self._tapped(x, _nothing)
        return self._tapped(x, partial(self._add, x.detach()))

    def fold(self, weight: Tensor, layout: str) -> Tensor:
        """A weight that is used without a layer, as it is."""
        return self._tapped(weight, partial(self._add_weight, weight.detach()))

    def watch(self, y: Tensor) -> None:
        """Sees the matmul's output, right after its input."""
        x, self.x = self.x, None
        if x is not None and y.requires_grad:
            y.register_hook(partial(self._add, x))

    def _tapped(self, tensor: Tensor, sink: Callable[[Tensor], None]) -> Tensor:
        # The anchor makes a gradient flow also where nothing before the site needs one.
        anchor = torch.zeros((), requires_grad=True)
        tapped: Tensor = _Tap.apply(anchor, tensor, sink)
        return tapped

    @torch.no_grad()
    def _add(self, x: Tensor, grad: Tensor) -> None:
        dtype = self.sketch.basis.dtype
        with torch.autocast(x.device.type, enabled=False):
            for rows, grads in zip(
                x.reshape(-1, x.shape[-1]).split(ROWS),
                grad.reshape(-1, grad.shape[-1]).split(ROWS),
                strict=True,
            ):
                self.sketch.add(self.reader, rows.to(dtype), grads.to(dtype))

    @torch.no_grad()
    def _add_weight(self, weight: Tensor, grad: Tensor) -> None:
        dtype = self.sketch.basis.dtype
        both = (tensor if self.layout == "out_in" else tensor.mT for tensor in (weight, grad))
        with torch.autocast(weight.device.type, enabled=False):
            self.sketch.add_weight(self.reader, *(tensor.to(dtype) for tensor in both))


class _Output(nn.Module):
    """A probe's other end, as a module of its own for graphs to call."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        # Not its owner: the sketch, as large as the supports, would wait for the garbage collector.
        self._probe = weakref.ref(probe)

    def forward(self, y: Tensor) -> Tensor:
        """The matmul's output, as it is."""
        probe = self._probe()
        assert probe is not None
        probe.watch(y)
        return y


def _nothing(grad: Tensor) -> None:
    pass


@contextmanager
def _in_modules(model: nn.Module, probes: Sequence[tuple[Site, Probe]]) -> Iterator[None]:
    """Probes as the innermost adapter of each site's module."""
    hooks = []
    try:
        for site, probe in probes:
            place(model, site, _NAME, probe)
            if site.kind != "functional":
                module = model.get_submodule(site.weight.rpartition(".")[0])
                hooks.append(module.register_forward_hook(_watching(probe)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        displace(model, [_NAME])


def _watching(probe: Probe) -> Callable[..., None]:
    return lambda module, args, y: probe.watch(y)


@contextmanager
def _in_graph(
    model: fx.GraphModule, plan: Plan, probes: Sequence[tuple[Site, Probe]]
) -> Iterator[None]:
    """Probes as nodes around each site's matmuls, in a copy of the graph."""
    own, by_site = model.graph, {site.fqn: probe for site, probe in probes}
    model.graph = copy.deepcopy(own)  # its calling convention included
    added = nn.ModuleList()
    try:
        model.add_module(_NAME, added)
        graph = model.graph
        for site, uses in insert.locate(host_of(model), plan):
            probe = by_site.get(site.fqn)
            if probe is None:
                continue
            name = f"{_NAME}.{len(added)}"
            added.append(probe)
            for use in uses:
                with graph.inserting_before(use.node):
                    use.feed(graph.call_module(name, (use.x,)))
                with graph.inserting_after(use.node):
                    watched = graph.call_module(f"{name}.output", (use.node,))
                use.node.replace_all_uses_with(watched)
                watched.args = (use.node,)
        model.recompile()
        yield
    finally:
        model._modules.pop(_NAME, None)
        model.graph = own
        model.recompile()
