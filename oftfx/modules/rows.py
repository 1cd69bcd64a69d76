"""A batch whose rows go through adapters of their own, in one forward.

    x_i = rotate(x_i, C[a])        for a row i of adapter a: blocks of one wide row for all of them
    x_i = x_i + ((x_i·Pᵀ)·K)·P     with the P[a] and K[a] of its adapter
    x_i                            as it is, where the row has no adapter

Cores are stacked by adapter, one of zeros for the base, and gathered by row: the matmul behind them
runs once for the whole batch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from oftfx.errors import PlanError
from oftfx.ops.factor import Factor
from oftfx.ops.rotate import ROTATE, rotate
from oftfx.ops.subspace import SUBSPACE
from oftfx.readers import cast


class Rows(NamedTuple):
    """Which adapter each row of a batch goes through.

    Attributes:
        names: The adapters.
        which: (rows,), each row's place among the names, counted from 1; 0 for the base.
    """

    names: tuple[str, ...]
    which: Tensor

    def of(self, x: Tensor) -> Tensor:
        """(x.shape[0],), the adapter of whatever lies along x's first axis.

        That is the rows; or, a row after the other, its tokens or the beams of a search.

        Raises:
            PlanError: The first axis holds no such thing.
        """
        rows, held = len(self.which), x.shape[0] if x.dim() > 1 else 0
        if held == 0 or held % rows:
            raise PlanError(
                f"{rows} rows have adapters of their own, but a layer reads a tensor of shape "
                f"{tuple(x.shape)}, whose first axis is no multiple of that: call the model with "
                f"{rows} rows, batch first, or exclude the layer from the adapters."
            )
        which = self.which.to(x.device)
        return which[:, None].expand(rows, held // rows).reshape(held)


def run(module: Any, base: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of an adapted layer for rows of several adapters.

    Args:
        module: The layer; its `oft_rows` say which.
        base: Its own class.
        x: Its input.
        args: What else its forward takes.
        kwargs: Likewise, by name.

    Raises:
        PlanError: x does not have these rows; or the model is being exported.
    """
    rows: Rows = module.oft_rows
    held = {k: module.oft[name] for k, name in enumerate(rows.names, 1) if name in module.oft}
    used = {k: rotation for k, rotation in held.items() if rotation.enabled}
    if not used:
        return base.forward(module, x, *args, **kwargs)
    # Dynamo of torch 2.11 takes every trace for an export.
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        raise PlanError(
            "a graph holds one composition of adapters for all rows: export the model outside of "
            "oftfx.rows, after oftfx.use."
        )
    index = rows.of(x)
    x = turned(cast(x), {k: rotation.applied() for k, rotation in used.items()}, index)
    y = base.forward(module, x, *args, **kwargs)
    magnitudes = {k: m for k, rotation in used.items() for m in rotation.magnitudes()}
    return scaled(y, magnitudes, getattr(module, "bias", None), index) if magnitudes else y


def turned(x: Tensor, applied: dict[int, tuple[Factor, ...]], index: Tensor) -> Tensor:
    """Every row of x, by the factors of its adapter.

    Args:
        x: (rows, ..., d).
        applied: The factors by number of the adapter.
        index: (rows,), those numbers; a row of another number stays as it is.
    """
    alike: dict[Any, dict[int, tuple[Factor, ...]]] = {}
    for k, factors in applied.items():
        alike.setdefault(tuple(map(_kind, factors)), {})[k] = factors
    for members in alike.values():  # one after the other, each leaves the others' rows
        for factors in zip(*members.values(), strict=True):
            x = _turned(x, dict(zip(members, factors, strict=True)), index)
    return x


def scaled(y: Tensor, magnitudes: dict[int, Tensor], bias: Tensor | None, index: Tensor) -> Tensor:
    """Every row of a matmul's y, (rows, ..., out), with all but the bias scaled."""
    held = _gathered(magnitudes, index, y.dtype).to(y.dtype)
    product = y if bias is None else y - bias.to(y.dtype)
    return y + product * held.view(len(held), *[1] * (y.dim() - 2), -1)


def _kind(factor: Factor) -> Any:
    operands = factor.operands
    return factor.op, tuple(o.shape if isinstance(o, Tensor) else o for o in operands)


def _turned(x: Tensor, factors: dict[int, Factor], index: Tensor) -> Tensor:
    op = next(iter(factors.values())).op
    if op not in (ROTATE, SUBSPACE):  # a tree of pairs turns all rows alike
        for k, factor in factors.items():
            here = (index == k).view(-1, *[1] * (x.dim() - 1))
            x = torch.where(here, factor(x), x)
        return x
    columns = zip(*(factor.operands for factor in factors.values()), strict=True)
    operands: list[Any] = [
        _gathered(dict(zip(factors, column, strict=True)), index, x.dtype)
        if isinstance(column[0], Tensor)
        else column[0]
        for column in columns
    ]
    return _rotated(x, *operands) if op is ROTATE else _within(x, *operands)


def _rotated(x: Tensor, core: Tensor, stride: int = 1) -> Tensor:
    """``x_i·blockdiag(I + C_i1 …)`` for a core (rows, n, b, b): the rows' blocks side by side."""
    rows, width = len(x), x.shape[-1]
    blocks = core.expand(-1, width // core.shape[-1], -1, -1)  # one for all, where they share it
    side_by_side = x.movedim(0, -2).flatten(-2)
    y = rotate(side_by_side, blocks.flatten(0, 1), stride)
    return y.unflatten(-1, (rows, width)).movedim(-2, 0).contiguous()


def _within(x: Tensor, support: Tensor, kernel: Tensor) -> Tensor:
    """``x_i + ((x_i·P_iᵀ)·K_i)·P_i`` for (rows, r, d) and (rows, r, r)."""
    lines, p, k = x.flatten(1, -2) if x.dim() > 2 else x[:, None], support.to(x), kernel.to(x)
    return torch.baddbmm(lines, (lines @ p.mT) @ k, p).view(x.shape)


def _gathered(values: dict[int, Tensor], index: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, …), each row's value; zeros for a row that has none.

    In the dtype they are computed with, which may be fewer bytes to copy for every row; in their
    own where gradients are summed over the rows.
    """
    if not any(value.requires_grad for value in values.values()):
        values = {k: value.to(dtype) for k, value in values.items()}
    zero = torch.zeros_like(next(iter(values.values())))
    stacked = torch.stack([values.get(k, zero) for k in range(max(values) + 1)])
    return stacked[index.where(index < len(stacked), 0)]
