"""The graph of one layer of an adapted model, as boxes to draw.

    the graph                                   its boxes
    cayley(theta), rotate(x, cayley)            rotate          inserted
    linear(rotate, weight)                      q_proj          a site
    view, transpose, mul, cat, …                self_attn       other

A box is a run of nodes of one module in an order that the graph allows, so boxes never read each
other in a circle.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from oftfx.capture import Model, capture
from oftfx.errors import CaptureError
from oftfx.modules import CHILD
from oftfx.nodes import behind
from oftfx.ops.factor import MAPS, SCALE
from oftfx.sites.naming import caller

Kind = Literal["inserted", "site", "other", "outside"]

MOST = 60
"""Boxes that a picture shows."""


@dataclass(frozen=True)
class Box:
    """Nodes that belong together.

    Attributes:
        label: What they are.
        note: A word more.
        kind: "inserted" by oftfx; the matmul of a "site"; "other" code of the layer; or "outside":
            what comes in and goes out.
        nodes: Each as it stands in the graph, `name = op(inputs)`.
        reads: The boxes it reads, by number: earlier ones.
    """

    label: str
    note: str
    kind: Kind
    nodes: tuple[str, ...]
    reads: tuple[int, ...]


@dataclass(frozen=True)
class LayerGraph:
    """What was captured of one layer of an adapted model.

    Attributes:
        layer: Its name; empty for the whole model.
        boxes: In an order in which they can run.
        left_out: How many more boxes there are.
    """

    layer: str
    boxes: tuple[Box, ...]
    left_out: int = 0

    def before(self) -> "LayerGraph":
        """The same without what oftfx inserted: its readers read what it reads."""
        kept: list[Box] = []
        stands_for: list[tuple[int, ...]] = []
        for box in self.boxes:
            reads = tuple(dict.fromkeys(new for old in box.reads for new in stands_for[old]))
            if box.kind == "inserted":
                stands_for.append(reads)
            else:
                stands_for.append((len(kept),))
                kept.append(Box(box.label, box.note, box.kind, box.nodes, reads))
        return LayerGraph(self.layer, tuple(kept), self.left_out)


def layer_graph(
    model: Model, layer: str, sites: Mapping[str, str], example_inputs: Any = None
) -> LayerGraph:
    """Captures an adapted model and picks out one layer.

    Args:
        model: Of any kind, adapted.
        layer: Name of a module; empty for the model itself.
        sites: What to note at each site, by its fqn.
        example_inputs: As for [`plan`][oftfx.plan].

    Raises:
        CaptureError: The model cannot be traced, or no node of its graph is the layer's.
    """
    found = capture(model, example_inputs, adapted=layer)
    boxes: list[Box] = []
    for graph in found.graphs:
        units = _units(graph.graph, layer)
        if units:
            boxes += _boxes(_runs(units, sites), sites, layer, len(boxes))
    if not boxes:
        raise CaptureError(f"the captured graph has no node of {layer!r}.")
    return LayerGraph(layer, tuple(boxes[:MOST]), max(0, len(boxes) - MOST))


@dataclass(eq=False)
class _Unit:
    """Nodes that stay together: one, or a rotation with all that makes its cores."""

    nodes: list[fx.Node]
    owner: str
    inserted: bool = False


def _units(graph: fx.Graph, layer: str) -> list[_Unit]:
    """The layer's nodes, in the order of the graph."""
    units: dict[fx.Node, _Unit] = {}
    claimed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in MAPS or node.target is SCALE:
            x, *operands = node.args
            before = units.get(x)
            made = [n for n in _calls(behind(_nodes(operands))) if n not in claimed]
            made.sort()
            if before is not None and before.inserted and len(x.users) == 1:
                before.nodes += [*made, node]  # a stage of the same rotation
                units[node] = before
            else:
                units[node] = _Unit([*made, node], "", inserted=True)
            claimed.update(made, [node])
    moving = _moving(graph)
    for node in reversed(_calls(graph.nodes)):
        if node in claimed:
            continue
        owner = _owner(node)
        reader = units.get(next(iter(node.users), node))
        prepares = len(node.users) == 1 and node not in moving
        if reader and prepares and not reader.inserted and reader.owner == owner:
            reader.nodes.insert(0, node)  # a weight that its only reader casts or transposes first
            units[node] = reader
        else:
            units[node] = _Unit([node], owner)
    for node in sorted(units, reverse=True):  # not every graph says whose inserted nodes are
        if units[node].inserted:
            owners = (units[user].owner for user in node.users if user in units)
            units[node].owner = _owner(node) or next(owners, "")
    inside = (u for _, u in sorted(units.items()) if _within(u.owner, layer))
    return list(dict.fromkeys(inside))


def _runs(units: list[_Unit], sites: Mapping[str, str]) -> list[list[_Unit]]:
    """Units of one owner one after the other, in an order that the graph allows."""
    of = {node: unit for unit in units for node in unit.nodes}
    waits = {
        unit: {of[n] for node in unit.nodes for n in node.all_input_nodes if n in of} - {unit}
        for unit in units
    }
    runs: list[list[_Unit]] = []
    left = dict.fromkeys(units)
    done: set[_Unit] = set()
    while left:
        ready = [unit for unit in left if waits[unit] <= done]
        if not ready:
            raise CaptureError("its rotations wait for each other, which no picture shows.")
        last = runs[-1][-1] if runs else None
        same = (u for u in ready if last and not (u.inserted or last.inserted))
        following = next((u for u in same if last and u.owner == last.owner), None)
        # Sites first: what comes after q, k and v then is one run.
        early = (u for u in ready if u.inserted or u.owner in sites)
        unit = following or next(early, ready[0])
        if following:
            runs[-1].append(unit)
        else:
            runs.append([unit])
        done.add(unit)
        del left[unit]
    return runs


def _boxes(
    runs: list[list[_Unit]], sites: Mapping[str, str], layer: str, start: int
) -> Iterator[Box]:
    """The boxes of one graph, what comes in first and what goes out last."""
    number = {node: i for i, run in enumerate(runs) for unit in run for node in unit.nodes}
    entering: dict[fx.Node, list[int]] = {}
    for node, i in number.items():
        for source in node.all_input_nodes:
            if source not in number and _is_activation(source):
                entering.setdefault(source, []).append(i)
    doors: dict[tuple[int, ...], list[fx.Node]] = {}
    for source, readers in entering.items():
        doors.setdefault(tuple(dict.fromkeys(readers)), []).append(source)
    for sources in doors.values():
        names = [_plain(source.name) for source in sources]
        more = f" +{len(names) - 2}" if len(names) > 2 else ""
        yield Box(", ".join(names[:2]) + more, "", "outside", tuple(names), ())
    first = start + len(doors)
    for i, run in enumerate(runs):
        inside = [node for unit in run for node in unit.nodes]
        reads = [start + d for d, readers in enumerate(doors) if i in readers]
        behind = (number.get(n, i) for node in inside for n in node.all_input_nodes)
        reads += [first + other for other in behind if other != i]
        label, note, kind = _label(run, sites, layer)
        yield Box(label, note, kind, tuple(map(_text, inside)), tuple(dict.fromkeys(reads)))
    leaving = {i: None for node, i in number.items() if not number.keys() >= node.users.keys()}
    yield Box("output", "", "outside", (), tuple(first + i for i in leaving))


def _label(run: list[_Unit], sites: Mapping[str, str], layer: str) -> tuple[str, str, Kind]:
    nodes = [node for unit in run for node in unit.nodes]
    if run[0].inserted:
        maps = [node for node in nodes if node.target in MAPS or node.target is SCALE]
        label = _op(maps[0]) + (f" ×{len(maps)}" if len(maps) > 1 else "")
        made = list(dict.fromkeys(_op(node) for node in nodes if node not in maps))
        return label, ", ".join(made) if len(made) < 3 else f"core of {len(made)} ops", "inserted"
    owner = run[0].owner
    if owner in sites:
        return owner.rpartition(".")[2], sites[owner], "site"
    name = owner[len(layer) :].strip(".")
    if len(nodes) < 3 or not name:
        ops = [_op(node) for node in nodes]
        return ", ".join(ops[:2]) + (" …" if len(ops) > 2 else ""), name, "other"
    return name.rpartition(".")[2], f"{len(nodes)} ops", "other"


def _owner(node: fx.Node) -> str:
    owner = str(node.target) if node.op == "call_module" else caller(node)
    return owner.partition(f".{CHILD}.")[0]


def _within(owner: str, layer: str) -> bool:
    return not layer or owner == layer or owner.startswith(f"{layer}.")


def _nodes(operands: Iterable[Any]) -> list[fx.Node]:
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def _calls(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Those that compute: none of a module's tensors, inputs and outputs, nor notes."""
    kinds = ("call_function", "call_method", "call_module")
    return [node for node in nodes if node.op in kinds and (node.users or not node.is_impure())]


def _moving(graph: fx.Graph) -> set[fx.Node]:
    """What depends on the model's input."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        behind = any(source in found for source in node.all_input_nodes)
        if behind or (node.op == "placeholder" and _is_activation(node)):
            found.add(node)
    return found


def _is_activation(source: fx.Node) -> bool:
    """Whether it is computed, or an input; a tracer tells what the model holds by its name."""
    held = r"^[pbc]_|_parameters_|_buffers_"
    input = source.op == "placeholder" and not re.search(held, source.name)
    return input or bool(_calls([source]))


def _plain(name: str) -> str:
    """The name of an input without what Dynamo wraps around it."""
    name = re.sub(r"^l_(kwargs_|args_)?|_$", "", name)
    return f"input {name}" if name.isdigit() else name


def _op(node: fx.Node) -> str:
    if node.op == "call_module" and isinstance(module := node.graph.owning_module, fx.GraphModule):
        return type(module.get_submodule(str(node.target))).__name__
    if node.target is getattr:
        return str(node.args[1])
    name = getattr(node.target, "__name__", str(node.target))
    return name.partition(".")[0]


def _text(node: fx.Node) -> str:
    inputs = ", ".join(_plain(source.name) for source in node.all_input_nodes)
    return f"{node.name} = {_op(node)}({inputs})"
