"""What the runs of a kernel found of a core's gradient is added where it is read.

    before                                       after
    dx, dC = rotate_grad(dy, x, C)               dx, S = rotate_grad(dy, x, C, shares=True)
    dtheta = cayley_each_grad([dC, …], …)        dtheta = cayley_each_grad([S, …], …)

and so for `glu_rotate_grad` and, whose shares are of all its cores together, `norm_rotate_grad`:

    dh, …, [dC_q, dC_k] = norm_rotate_grad(…)    dh, …, [S] = norm_rotate_grad(…, shares=True)
                                                 S_q, S_k = S[:, 0], S[:, 1]

Where there are few tokens, to add them in launches of their own takes as long as many a kernel. The
sums are the same to the bit. Left as they are: gradients that something else reads as well, those
that one run finds, and those of a dynamic number of rows, whose runs nobody knows yet.

This pass works on the graph that inductor gets after autograd, so it runs where inductor compiles:
a graph that is found in a cache has it applied, and counts nothing.
"""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.node import map_arg

from oftfx.ops.cayley_each import CAYLEY_EACH_GRAD
from oftfx.ops.glu_rotate import GLU_ROTATE_GRAD
from oftfx.ops.norm_rotate import NORM_ROTATE_GRAD
from oftfx.ops.rotate import ROTATE_GRAD

HOOK = "post_grad_custom_pre_pass"
"""The option of inductor's that takes such a pass."""

FOUND = {ROTATE_GRAD: 1, GLU_ROTATE_GRAD: 2, NORM_ROTATE_GRAD: 5}
"""Which of an op's results is its core's gradient, or the list of its cores'."""


class SumRuns(CustomGraphPass):
    """The pass, as inductor takes it."""

    def __call__(self, graph: fx.Graph) -> None:
        """Edits a graph after autograd, and counts how often."""
        saved = sum_runs(graph)
        if saved:
            counters["oftfx"]["sum_runs"] += saved

    def uuid(self) -> bytes:
        """What the compile caches tell its versions by; that of the ops is in their keys anyway."""
        return get_hash_for_files((str(Path(__file__)),))


def before(given: Any) -> Any:
    """The pass and, behind it, what inductor was given for the same place: None, one or several."""
    if given is None:
        return SumRuns()
    if not hasattr(custom_graph_pass, "get_custom_graph_passes"):
        return _Both(given)
    return [SumRuns(), *custom_graph_pass.get_custom_graph_passes(given)]


class _Both(CustomGraphPass):
    """The pass and another as one: before torch 2.13 inductor takes no more."""

    def __init__(self, other: Callable[[fx.Graph], None]) -> None:
        self.other = other

    def __call__(self, graph: fx.Graph) -> None:
        SumRuns()(graph)
        self.other(graph)

    def uuid(self) -> Any:
        """Nothing, which keeps inductor from its caches, where the other has nothing."""
        own = self.other.uuid() if isinstance(self.other, CustomGraphPass) else None
        return own and (SumRuns().uuid(), own)


def sum_runs(graph: fx.Graph) -> int:
    """Hands shares to `oftfx::cayley_each_grad`; returns how many launches that saved."""
    readers = set(graph.find_nodes(op="call_function", target=CAYLEY_EACH_GRAD))
    if not readers:
        return 0
    nodes = [n for op in FOUND for n in graph.find_nodes(op="call_function", target=op)]
    return sum(_hand_over(node, readers) for node in nodes)


def _hand_over(node: fx.Node, readers: set[fx.Node]) -> bool:
    """Has an op give shares, where its cores' gradients are the readers' alone."""
    which = FOUND[node.target]
    found = next((user for user in node.users if user.args[1] == which), None)
    if found is None or not _is_static(node):
        return False
    several = isinstance(found.meta["val"], list | tuple)
    grads = list(found.users) if several else [found]
    if not all(grad.users and readers.issuperset(grad.users) for grad in grads):
        return False
    args, kwargs = map_arg((node.args, {**node.kwargs, "shares": True}), _value)
    op: Any = node.target
    value = op(*args, **kwargs)
    shares = value[which][0] if several else value[which]
    if len(shares) == 1:
        return False
    node.update_kwarg("shares", True)
    node.meta["val"], found.meta["val"] = value, value[which]
    if "eager_input_vals" in node.meta:  # by which inductor lays out what an op reads
        args, kwargs = node.meta["eager_input_vals"]
        node.meta["eager_input_vals"] = args, {**kwargs, "shares": True}
    for reader in {user for grad in grads for user in grad.users}:
        reader.meta.pop("eager_input_vals", None)  # it takes its operands in any layout
    if several:
        _select(found, grads, shares)
    return True


def _is_static(node: fx.Node) -> bool:
    """Whether everything that an op reads is a tensor of known sizes."""
    values = [_value(given) for given in node.all_input_nodes]
    return all(isinstance(v, Tensor) and not v._has_symbolic_sizes_strides for v in values)


def _select(found: fx.Node, grads: list[fx.Node], shares: Tensor) -> None:
    """Puts each core's part of the shares of all in its gradient's place."""
    select: Any = torch.ops.aten.select.int
    with found.graph.inserting_after(found):
        joined = found.graph.call_function(operator.getitem, (found, 0))
    joined.meta["val"] = shares
    for grad in grads:
        with found.graph.inserting_before(grad):
            own = found.graph.call_function(select, (joined, 1, grad.args[1]))
        own.meta["val"] = select(shares, 1, grad.args[1])
        grad.replace_all_uses_with(own)
        found.graph.erase_node(grad)


def _value(node: fx.Node) -> Any:
    return node.meta["val"]
