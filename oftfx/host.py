"""Graphs that own parameters: one face for GraphModule and ExportedProgram.

A GraphModule reads a parameter by `get_attr`, an ExportedProgram by a placeholder that its
signature ties to a name in its state dict. Everything that edits a graph goes through a host.
"""

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputSpec, TensorArgument

from oftfx.nodes import CAST_NOTE


class Host(Protocol):
    """A graph and the parameters it reads."""

    module: fx.GraphModule

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Every parameter, under each of its names."""

    def readers(self) -> dict[fx.Node, str]:
        """The nodes that read a parameter, and its name."""

    def set(self, name: str, value: nn.Parameter) -> None:
        """Replaces a parameter's tensor."""

    def held(self, node: fx.Node) -> Tensor | None:
        """What a node reads from the model: a parameter, buffer or constant; None for others."""

    def hold(self, node: fx.Node, value: Tensor) -> None:
        """Replaces what a node reads from the model."""

    def drop(self, node: fx.Node) -> None:
        """Removes a node that nothing uses any more, and the buffer or constant that it reads."""

    def add(self, name: str, value: nn.Parameter) -> fx.Node:
        """Adds a parameter and the node that reads it."""

    def remove(self, node: fx.Node, name: str) -> None:
        """Removes a parameter and the node that reads it, which nothing uses any more."""

    def finish(self) -> Any:
        """The edited model."""


def host_of(model: fx.GraphModule | ExportedProgram, edit: bool = False) -> Host:
    """The host for a model, to read or to edit: a program is copied first, a module edited."""
    return _Program(model, edit) if isinstance(model, ExportedProgram) else _Module(model)


def parameters_of(model: nn.Module | ExportedProgram) -> dict[str, nn.Parameter]:
    """Every parameter of a model of any kind, under each of its names."""
    if isinstance(model, (fx.GraphModule, ExportedProgram)):
        return dict(host_of(model).parameters())
    return dict(model.named_parameters(remove_duplicate=False))


class _Module:
    """A GraphModule: parameters live in its module tree."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.module.named_parameters(remove_duplicate=False))

    def readers(self) -> dict[fx.Node, str]:
        names = self.parameters()
        nodes = self.module.graph.find_nodes(op="get_attr")
        return {node: node.target for node in nodes if node.target in names}

    def set(self, name: str, value: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(self.module.get_submodule(path), leaf, value)

    def held(self, node: fx.Node) -> Tensor | None:
        found = self._owner(node) if node.op == "get_attr" else None
        value = None if found is None else getattr(*found)
        return value if isinstance(value, Tensor) else None

    def hold(self, node: fx.Node, value: Tensor) -> None:
        setattr(*self._owner(node), value)
        node.meta.update(_like(self.module, value))

    def drop(self, node: fx.Node) -> None:
        delattr(*self._owner(node))
        self.module.graph.erase_node(node)

    def _owner(self, node: fx.Node) -> tuple[nn.Module, str]:
        path, _, leaf = str(node.target).rpartition(".")
        return self.module.get_submodule(path), leaf

    def add(self, name: str, value: nn.Parameter) -> fx.Node:
        holder: nn.Module = self.module
        *path, leaf = name.split(".")
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        holder.register_parameter(leaf, value)
        graph = self.module.graph
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            node = graph.get_attr(name)
        node.meta.update(_like(self.module, value))
        return node

    def remove(self, node: fx.Node, name: str) -> None:
        self.module.graph.erase_node(node)
        path = name.split(".")
        holder = self.module.get_submodule(".".join(path[:-1]))
        del holder._parameters[path[-1]]
        while len(path) > 1:  # containers that only held this parameter go with it
            path.pop()
            holder = self.module.get_submodule(".".join(path))
            if type(holder) is not nn.Module or [*holder.children(), *holder.parameters()]:
                break
            del self.module.get_submodule(".".join(path[:-1]))._modules[path[-1]]

    def finish(self) -> fx.GraphModule:
        self.module.graph.lint()
        self.module.recompile()
        return self.module


class _Program:
    """An ExportedProgram: parameters live in its state dict; the result is a new program."""

    def __init__(self, program: ExportedProgram, edit: bool) -> None:
        self.program = program
        self.module = copy.deepcopy(program.graph_module) if edit else program.graph_module
        nodes = zip(program.graph.nodes, self.module.graph.nodes, strict=True)
        for given, copied in nodes:  # a copy renames what is called like a builtin, such as `input`
            copied.name = given.name
        self.state = dict(program.state_dict)
        self.constants = dict(program.constants)
        self.inputs = list(program.graph_signature.input_specs)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {n: value for n, value in self.state.items() if isinstance(value, nn.Parameter)}

    def readers(self) -> dict[fx.Node, str]:
        names = {
            spec.arg.name: spec.target for spec in self.inputs if spec.kind is InputKind.PARAMETER
        }
        nodes = self.module.graph.find_nodes(op="placeholder")
        return {node: names[node.name] for node in nodes if node.name in names}

    def set(self, name: str, value: nn.Parameter) -> None:
        self.state[name] = value

    def held(self, node: fx.Node) -> Tensor | None:
        found = self._store(node)
        value = None if found is None else found[0][found[1]]
        return value if isinstance(value, Tensor) else None

    def hold(self, node: fx.Node, value: Tensor) -> None:
        store, name = self._store(node)  # type: ignore[misc]
        store[name] = value
        node.meta.update(_like(self.module, value))

    def drop(self, node: fx.Node) -> None:
        store, name = self._store(node)  # type: ignore[misc]
        del store[name]
        self.inputs = [spec for spec in self.inputs if spec.arg.name != node.name]
        self.module.graph.erase_node(node)

    def _store(self, node: fx.Node) -> tuple[dict[str, Any], str] | None:
        """Where the tensor behind a placeholder is kept, and its name there."""
        names = {spec.arg.name: spec.target for spec in self.inputs}
        name = names.get(node.name) if node.op == "placeholder" else None
        if name is None:
            return None
        return next(((at, name) for at in (self.state, self.constants) if name in at), None)

    def add(self, name: str, value: nn.Parameter) -> fx.Node:
        graph = self.module.graph
        with graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder("p_" + re.sub(r"\W", "_", name))
        node.meta.update(_like(self.module, value))
        self.state[name] = value
        spec = InputSpec(InputKind.PARAMETER, TensorArgument(name=node.name), name)
        self.inputs.insert(0, spec)
        return node

    def remove(self, node: fx.Node, name: str) -> None:
        self.module.graph.erase_node(node)
        del self.state[name]
        self.inputs = [spec for spec in self.inputs if spec.target != name]

    def finish(self) -> ExportedProgram:
        self.module.graph.lint()
        self.module.recompile()
        old = self.program
        signature = copy.copy(old.graph_signature)
        signature.input_specs = self.inputs
        (outputs,) = self.module.graph.output_node().args
        signature.output_specs = [
            _named(spec, node)
            for spec, node in zip(old.graph_signature.output_specs, outputs, strict=True)
        ]
        return ExportedProgram(
            root=self.module,
            graph=self.module.graph,
            graph_signature=signature,
            state_dict=self.state,
            range_constraints=old.range_constraints,
            module_call_graph=copy.deepcopy(old.module_call_graph),
            example_inputs=old.example_inputs,
            constants=self.constants,
            verifiers=old.verifiers,
        )


def _named(spec: OutputSpec, node: Any) -> OutputSpec:
    """An output's entry in the signature, by the node that gives it now."""
    if not isinstance(spec.arg, TensorArgument):
        return spec
    return dataclasses.replace(spec, arg=TensorArgument(name=node.name))


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Adds a call, with the metadata an exported graph's nodes carry where the others have it."""
    node = graph.call_function(target, args, kwargs)
    if (mode := _fake_mode(graph)) is not None:
        values, options = fx.node.map_arg((args, kwargs), lambda source: source.meta["val"])
        with mode, torch.enable_grad():
            node.meta["val"] = target(*values, **options)
    return node


def erase(host: Host, nodes: Iterable[fx.Node]) -> None:
    """Erases nodes with all that reads them, and what they alone read: other nodes, constants.

    A parameter stays, and so does the node that reads it.
    """
    graph = host.module.graph
    dead = list(dict.fromkeys(nodes))
    for node in dead:  # grows while it is walked
        dead += [user for user in node.users if user not in dead]
    assert graph.output_node() not in dead, f"{dead[0]} is read by what the graph gives"
    sources = dict.fromkeys(source for node in dead for source in node.all_input_nodes)
    for node in [node for node in reversed(graph.nodes) if node in dead]:
        graph.erase_node(node)
    for source in (source for source in sources if source not in dead):
        if any(user.target is not CAST_NOTE for user in source.users):
            continue
        if source.op in ("call_function", "call_method"):
            erase(host, (source,))
        elif source.users:
            erase(host, source.users)
        elif source not in host.readers() and host.held(source) is not None:
            host.drop(source)


def _like(module: fx.GraphModule, value: Tensor) -> dict[str, Any]:
    mode = _fake_mode(module.graph)
    return {} if mode is None else {"val": mode.from_tensor(value, static_shapes=True)}


def _fake_mode(graph: fx.Graph) -> Any:
    """The mode of an exported graph's metadata; None for a graph without.

    Dynamo's own graphs have such metadata at their inputs alone.
    """
    values = (node.meta.get("val") for node in graph.nodes if node.op == "call_function")
    return next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)
