"""A model → the FX graphs of its forward, and which of their nodes are parameters.

nn.Module        traced by Dynamo on a shadow copy whose tensors are on `meta`
GraphModule      taken as it is
ExportedProgram  taken as it is, parameters read off its signature
"""

import contextlib
import copy
import re
import traceback
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import optree
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import fake_tensor_tls
from torch.export import ExportedProgram
from torch.nn.parallel import DistributedDataParallel

from oftfx import inputs as model_inputs
from oftfx.errors import CaptureError, PlanError
from oftfx.host import Host, host_of
from oftfx.modules import CHILD, Adapted, Class, bare, become, rotating, unhook
from oftfx.nodes import body_of
from oftfx.progress import waiting
from oftfx.regions import differentiable, opens
from oftfx.sites import matmul, quantiser_of
from oftfx.sites.quantised import stand_in

Model = nn.Module | ExportedProgram


@dataclass
class Capture:
    """The graphs of one model.

    Attributes:
        graphs: One graph module per traced frame; one unless Dynamo had to break the graph.
        parameters: Node → name of the parameter it stands for (of tied names, the first).
        tensors: Name → the parameter, under each of its names; its values are never read.
        aliases: Name → all names of that tensor; more than one where weights are tied.
    """

    graphs: list[fx.GraphModule]
    tensors: dict[str, Tensor]
    aliases: dict[str, tuple[str, ...]]
    parameters: dict[fx.Node, str] = field(default_factory=dict)


def unwrap(model: Any) -> Any:
    """The model inside the wrappers of torch.compile and of data parallelism.

    Raises:
        PlanError: It is no model.
    """
    wrappers = (DistributedDataParallel, nn.DataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    if not isinstance(model, Model):
        raise PlanError(
            f"model is a {type(model).__name__}: it must be an nn.Module, a torch.fx.GraphModule "
            "or a torch.export.ExportedProgram."
        )
    return model


def capture(model: Model, example_inputs: Any = None, adapted: str | None = None) -> Capture:
    """Traces a model; its parameters, buffers and state stay untouched.

    Args:
        model: An nn.Module, GraphModule or ExportedProgram.
        example_inputs: For an nn.Module: a tensor, a tuple of positional or a dict of keyword
            arguments. None builds them from a transformers model's own main input.
        adapted: Name of the part of an nn.Module to trace with its adapters, empty for all of it;
            None traces the base. A graph shows its own in any case.

    Raises:
        CaptureError: The model cannot be traced; names the line of the user's code.
    """
    if isinstance(model, ExportedProgram):
        return read(host_of(differentiable(model)))
    if isinstance(model, fx.GraphModule):
        return read(host_of(differentiable(_twin(model)) if opens(model) else model))
    return _module(model, example_inputs, adapted)


def read(host: Host) -> Capture:
    """The capture of a graph that owns its parameters."""
    found = Capture([host.module], *_names(host.parameters().items()))
    found.parameters = {node: found.aliases[name][0] for node, name in host.readers().items()}
    _enter_bodies(found)
    _unpack_shapes(found)
    return found


def _unpack_shapes(found: Capture) -> None:
    """Lets a packed weight show as the floats (out, in) that the matmul over it stands for."""
    for graph in found.graphs:
        for node in graph.graph.nodes:
            shape, packed = matmul.quantised_shape(node), matmul.packed_behind(node)
            name = None if packed is None else found.parameters.get(packed)
            if name is not None and shape is not None:
                for alias in found.aliases[name]:
                    found.tensors[alias] = torch.empty(shape, device="meta")


def _module(model: nn.Module, example_inputs: Any, adapted: str | None) -> Capture:
    if example_inputs is None:
        args, kwargs = (), model_inputs.example_inputs(model)
    else:
        args, kwargs = optree.tree_map(_on_meta, cast("Any", arguments(example_inputs)))
    shadow = _shadow(model, adapted)
    try:
        found = _trace(shadow, args, kwargs)
    except Exception as error:
        try:
            # For code that makes tensors on the default device. Not the first choice: Dynamo
            # takes four times as long under a device context.
            with torch.device("meta"):
                found = _trace(shadow, args, kwargs)
        except Exception:
            raise CaptureError(
                f"{type(model).__name__} could not be traced to a graph at {_where(error)}: "
                f"{_first_line(error)}\n"
                "Mend that line, pass other example_inputs, or plan from the module tree instead: "
                'oftfx.plan(model, spec, capture="modules"). That sees nn.Linear and its like, but '
                "no functional matmuls and no shared inputs."
            ) from error
    if not found.graphs:
        raise CaptureError(
            f"{type(model).__name__} gave no graph: torch.compile is switched off here "
            "(TORCH_COMPILE_DISABLE, a stance, or torch.compiler.disable on its forward). "
            'Switch it on for planning, or use capture="modules".'
        )
    _enter_bodies(found)
    return found


def _trace(shadow: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    found = Capture([], *_names(_parameters(shadow)))
    # A new code object per capture: Dynamo's cache entry hangs on it and dies with it, instead of
    # counting towards the recompile limit of the model's own forward.
    frame = types.FunctionType(_call.__code__.replace(), _call.__globals__)
    title = f"tracing {type(shadow).__name__}"
    with (
        waiting(title),
        torch.enable_grad(),
        _lists_index(),
        _Recorder(found),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Dynamo's advice on the user's code, not on planning
        torch.compile(frame, backend=_collect, dynamic=False)(shadow, args, kwargs)
    return found


@contextlib.contextmanager
def _lists_index() -> Iterator[None]:
    """Lets traced code index with a list, `x[..., [-1], :]`.

    torch makes the list a tensor on x's device, unseen by the fake mode; on `meta`, unlike on a
    real device, that mode then refuses it (torch 2.11 to 2.13).
    """
    before = fake_tensor_tls.allow_non_fake_inputs_override
    fake_tensor_tls.allow_non_fake_inputs_override = True
    try:
        yield
    finally:
        fake_tensor_tls.allow_non_fake_inputs_override = before


class _Recorder:
    """Collects the graphs that run while it is entered, with the parameters each ran on.

    Where the graph is broken, layers that share a code frame share one compiled graph, and so do
    captures of one class: what tells them apart is the tensors each call comes with.
    """

    active: ClassVar["_Recorder | None"] = None

    def __init__(self, found: Capture) -> None:
        self.found = found
        self.names = {id(tensor): found.aliases[n][0] for n, tensor in found.tensors.items()}
        self.seen: set[tuple[int, tuple[str | None, ...]]] = set()

    def __enter__(self) -> None:
        self.before, _Recorder.active = _Recorder.active, self

    def __exit__(self, *exception: object) -> None:
        _Recorder.active = self.before

    def record(self, graph: fx.GraphModule, tensors: Sequence[Any]) -> None:
        names = tuple(self.names.get(id(tensor)) for tensor in tensors)
        if (id(graph), names) in self.seen:
            return
        self.seen.add((id(graph), names))
        mine = _twin(graph)
        for node, name in zip(mine.graph.find_nodes(op="placeholder"), names, strict=True):
            if name is not None:
                self.found.parameters[node] = name
        self.found.graphs.append(mine)


def _twin(graph: fx.GraphModule) -> fx.GraphModule:
    """The same graph with nodes of its own."""
    nodes = fx.Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    return fx.GraphModule(graph, nodes)


def _collect(graph: fx.GraphModule, tensors: Sequence[Tensor]) -> Any:
    """A Dynamo backend that runs the graph as it is and tells the recorder."""

    def run(*tensors: Any) -> Any:
        if _Recorder.active is not None:
            _Recorder.active.record(graph, tensors)
        return graph.forward(*tensors)

    return run


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _shadow(model: nn.Module, adapted: str | None = None) -> nn.Module:
    """A copy of the model on `meta`, in evaluation mode: no memory, no side effects on the model.

    Adapters are left out but for those of one part, ``adapted``: what is planned is the base. A
    quantised layer is there as the float layer it stands for. Every floating parameter requires a
    gradient there, so that no inference-only fast path hides a matmul inside an opaque kernel.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if (quantiser := quantiser_of(module)) is not None:
            memo[id(module)] = stand_in(module, quantiser)
            continue
        for tensor in _own_tensors(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = _to_meta(tensor)
    try:
        shadow = copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied for tracing: {_first_line(error)}\n"
            'Remove the attribute that copy.deepcopy refuses, or use capture="modules".'
        ) from error
    for name, module in model.named_modules():
        if not isinstance(module, Adapted):
            continue
        twin = shadow.get_submodule(name)
        if adapted is None or not f"{name}.".startswith(f"{adapted}." if adapted else ""):
            if isinstance(twin, Adapted):
                bare(twin)
        elif not isinstance(twin, Adapted):  # what stands in for a quantised layer
            twin.add_module(CHILD, copy.deepcopy(module.oft, memo))
            base: Class = type(twin)
            become(twin, rotating(base))
            vars(twin)["oft_order"] = module.oft_order
    for module in shadow.modules():
        unhook(module)  # its hooks would move `meta` to real devices
    return shadow


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and tensors in plain attributes and the containers among them."""
    leaves = optree.tree_leaves(cast("Any", vars(module)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters under every name they are tied to; a module of two names counts once."""
    for fqn, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{fqn}.{name}" if fqn else name), parameter


def _to_meta(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        twin = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, requires_grad=tensor.is_floating_point())
    return twin


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, from a tensor, a tuple or a dict."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _on_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def _names(
    named: Iterable[tuple[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Every name's tensor, and all the names that share it."""
    tensors = {name: tensor for name, tensor in named if isinstance(tensor, Tensor)}
    holders: dict[int, tuple[str, ...]] = {}
    for name, tensor in tensors.items():
        key = _identity(tensor)
        holders[key] = (*holders.get(key, ()), name)
    return tensors, {name: names for names in holders.values() for name in names}


def _identity(tensor: Tensor) -> int:
    """Equal for tied tensors: exported programs keep two tensors over one storage."""
    if tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    return hash((tensor.data_ptr(), tensor.shape, tensor.stride()))


def _enter_bodies(found: Capture) -> None:
    """Adds the bodies of higher-order ops as graphs.

    Their placeholders stand for the op's last operands, parameters among them.
    """
    for graph in found.graphs:  # grows while it is walked
        for node in graph.graph.find_nodes(op="get_attr"):
            body = body_of(graph, node)
            if body is None:
                continue
            for user in node.users:
                inside = _twin(body)
                placeholders = inside.graph.find_nodes(op="placeholder")
                operands = user.args[len(user.args) - len(placeholders) :]
                for inner, outer in zip(placeholders, operands, strict=False):
                    if isinstance(outer, fx.Node) and outer in found.parameters:
                        found.parameters[inner] = found.parameters[outer]
                found.graphs.append(inside)


def _where(error: BaseException) -> str:
    """The innermost line of the user's own code behind an error, as "file:line, in function"."""
    told = str(error).partition("from user code:")[2]  # Dynamo's own account, where it has one
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', told) or [
        (frame.filename, frame.lineno, frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    foreign = ("<", *(str(Path(file).parent) for file in (torch.__file__, __file__)))
    file, line, function = ([f for f in frames if not f[0].startswith(foreign)] or frames)[-1]
    return f"{file}:{line}, in {function}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    headline = text.split("\n", 1)[0] or type(error).__name__
    cause = re.search(r" got (\w+Error\(.*\))$", text, re.MULTILINE)  # of a faked operation
    return f"{headline}: {cause[1]}" if cause else headline
