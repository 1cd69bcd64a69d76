"""Graph passes: each replaces oftfx's ops by cheaper ones that compute the same.

A pass takes one `fx.GraphModule` of torch-level nodes, as Dynamo hands it to a backend, edits its
graph in place, and returns how often it did. It runs before autograd, whose formulas of the
ops then give the backward, and before the compile caches, which so never see a graph without it.
What only autograd's graph shows is left to `oftfx.passes.sum_runs`, which inductor runs.
"""

from collections.abc import Callable

from torch import fx

from oftfx.passes.batch_cores import batch_cores
from oftfx.passes.fold import fold
from oftfx.passes.fuse_glu import fuse_glu
from oftfx.passes.fuse_norm import fuse_norm
from oftfx.passes.group import group
from oftfx.passes.multiply import multiply
from oftfx.passes.round_cores import round_cores

Pass = Callable[[fx.GraphModule], int]

PASSES: dict[str, Pass] = {
    # Before `batch_cores`, behind which every core comes of all parameters and nothing tells which
    # rotation is shared; before the others, which would fuse the rotations it takes.
    "fold": fold,
    "batch_cores": batch_cores,
    "round_cores": round_cores,
    "group": group,
    "fuse_norm": fuse_norm,
    "fuse_glu": fuse_glu,
    "multiply": multiply,  # what no other pass takes a matmul for
}
"""Every pass by the name of its option, in the order they run."""
