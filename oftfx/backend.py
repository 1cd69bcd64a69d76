"""`torch.compile(model, backend="oftfx")`: counts the rotations, runs the passes, then inductor.

Counts land in Dynamo's own counters, `torch._dynamo.utils.counters["oftfx"]`: graphs, rotations,
distinct cores, and under each pass's name how many ops it saved.
"""

import functools
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor, fx
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters

from oftfx import ops
from oftfx.errors import OftfxWarning
from oftfx.ops.factor import MAPS
from oftfx.passes import PASSES
from oftfx.passes.sum_runs import HOOK, before
from oftfx.sites import matmul

log = logging.getLogger("oftfx")


def oftfx(
    graph: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """A Dynamo backend, found by its entry point; nobody calls it directly.

    Args:
        graph: The graph Dynamo traced.
        example_inputs: Its inputs.
        mode: As for ``torch.compile`` with inductor.
        options: ``{pass: False}`` leaves a pass out, ``sum_runs`` among them, which runs after
            autograd; the rest are inductor's config patches.
    """
    nodes = list(_nodes(graph))
    rotations = [node for node in nodes if node.target in MAPS]
    counts = counters["oftfx"]
    counts["graphs"] += 1
    counts["rotations"] += len(rotations)
    counts["cores"] += len({node.args[1] for node in rotations})
    log.info("graph %d: %d rotations", counts["graphs"], len(rotations))
    if not counts["rotations"] and any(matmul.spelling(node) for node in nodes):
        warnings.warn(
            'backend="oftfx" compiles a graph without rotations: adapt the model with '
            "oftfx.adapt(model, spec) first, or compile it with the default backend.",
            OftfxWarning,
            stacklevel=2,
        )
    given = dict(options or {})
    wanted = [run for name, run in PASSES.items() if given.pop(name, True)]
    for module in [m for m in graph.modules() if isinstance(m, fx.GraphModule)]:
        for run in wanted:
            counts[run.__name__] += run(module)
        module.recompile()
    sums = given.pop("sum_runs", True)
    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **given}
    if sums:
        patches[HOOK] = before(patches.get(HOOK, getattr(torch._inductor.config, HOOK)))
    inductor: Any = lookup_backend("inductor")
    # The compile caches know the ops by name; what a name stands for is in this tag.
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag} oftfx {_source()}".strip()):
        compiled: Callable[..., Any] = inductor(graph, example_inputs, config_patches=patches)
    return compiled


@functools.cache
def _source() -> str:
    """A digest of the code of the ops, whose gradients the caches keep compiled."""
    files = sorted(Path(ops.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _nodes(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """All nodes, those in the bodies of higher-order ops included."""
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes
