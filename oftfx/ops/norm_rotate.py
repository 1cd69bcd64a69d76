"""`oftfx::norm_rotate`: a normalised tensor turned by several cores, and never written itself.

The norm's statistics come from outside. There the compiler computes them in the kernel that writes
x, and adds their gradients where it adds the residual's; here they are one number a row. What the
backward keeps is x, which a frozen model keeps for its norm as well, those numbers and the cores.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oftfx.ops.define import LIBRARY, call, define, differentiate
from oftfx.ops.kernels import kernels, on
from oftfx.ops.precision import as_given
from oftfx.ops.rotate_group import rotate_group, rotate_group_grad
from oftfx.ops.shares import fake, only


class Norm(NamedTuple):
    """What makes ``(x − mean)·rstd·weight + bias`` of x (..., n·b).

    Attributes:
        mean: (..., 1), of each row; None subtracts nothing, as in an RMSNorm.
        rstd: (..., 1), by what each row is multiplied.
        weight: (n·b,), by what each column is multiplied; None for ones.
        bias: (n·b,), what is added to each row; None for zeros.
    """

    mean: Tensor | None
    rstd: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


class Gradients(NamedTuple):
    """Those of x, of what a [`Norm`][oftfx.ops.Norm] has and of each core; empty if not needed."""

    x: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    cores: list[Tensor]


_NORM = "Tensor? mean, Tensor rstd, Tensor? weight, Tensor? bias"


def norm_rotate(
    x: Tensor, norm: Norm, cores: list[Tensor], dtype: torch.dtype, readers: int = 1
) -> list[Tensor]:
    """[`rotate_group`][oftfx.ops.rotate_group] of ``(x − mean)·rstd·weight + bias``.

    The norm is computed in float32 (float64 of a float64 x) and rounded once, to ``dtype``; models
    that round between its steps get that much nearer to the exact norm.

    Args:
        x: (..., n·b), floating.
        norm: What is made of it.
        cores: Each (n, b, b), of one shape.
        dtype: What the norm is rounded to before it is rotated.
        readers: How often each rotation is wanted. The gradients of all are added where they are
            turned back, not in a pass of their own.

    Returns:
        For each core, ``readers`` times (..., n·b) in ``dtype``, contiguous; of one memory where
        no two of them are written to.

    Raises:
        RuntimeError: The width of x is not n·b.
    """
    result: list[Tensor] = NORM_ROTATE(x, cores, dtype, readers, *norm)
    return result


@as_given
def _norm_rotate(
    x: Tensor, cores: list[Tensor], dtype: torch.dtype, readers: int, *given: Any
) -> list[Tensor]:
    norm = Norm(*given)
    fast = kernels("norm_rotate", x.device)
    if fast is None or not fast.fits(x, cores, dtype):
        outs = rotate_group(normed(x, norm, dtype), cores)
    else:
        with on(x.device):
            outs = fast.norm_rotate(x, norm, cores, dtype)
    return [each for out in outs for each in (out, *(out.clone() for _ in range(readers - 1)))]


NORM_ROTATE = define(
    f"norm_rotate(Tensor x, Tensor[] cores, ScalarType dtype, int readers, {_NORM}) -> Tensor[]",
    _norm_rotate,
)


@torch.library.register_fake("oftfx::norm_rotate", lib=LIBRARY)
def _(
    x: Tensor, cores: list[Tensor], dtype: torch.dtype, readers: int, *given: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape, dtype=dtype) for _ in range(readers * len(cores))]


def served(x: Tensor, cores: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether one kernel does it all; elsewhere the op costs what its parts do."""
    fast = kernels("norm_rotate", x.device)
    return fast is not None and bool(fast.fits(x, cores, dtype))


def norm_rotate_grad(
    grads: list[Tensor],
    x: Tensor,
    norm: Norm,
    cores: list[Tensor],
    need_x: bool,
    need_affine: bool,
    need_cores: bool,
) -> Gradients:
    """Gradients of [`norm_rotate`][oftfx.ops.norm_rotate].

    Args:
        grads: For each core, the gradients of what it turned the norm to, (..., n·b), one for
            each reader.
        x: (..., n·b).
        norm: What was made of it.
        cores: Each (n, b, b).
        need_x: Whether the gradients of x, the mean and rstd are wanted.
        need_affine: Whether those of weight and bias are wanted.
        need_cores: Whether those of the cores are wanted.

    Returns:
        Of x, mean, rstd, weight and bias, and of each core, in its dtype and shape; of x with the
        statistics held fixed.
    """
    return Gradients(*NORM_ROTATE_GRAD(grads, x, cores, need_x, need_affine, need_cores, *norm))


def _norm_rotate_grad(
    grads: list[Tensor],
    x: Tensor,
    cores: list[Tensor],
    need_x: bool,
    need_affine: bool,
    need_cores: bool,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shares: bool = False,
) -> Gradients:
    norm = Norm(mean, rstd, weight, bias)
    fast = _kernels(grads, x, cores, need_affine)
    if fast is None:
        grads = _added(grads, len(cores))
        found = _in_parts(grads, x, norm, cores, need_x, need_affine, need_cores)
        return found._replace(cores=[only(torch.stack(found.cores))]) if shares else found
    run = fast.shares if shares else fast.norm_rotate_grad
    with on(x.device):
        grad_x, grad_mean, grad_rstd, grad_cores = run(grads, x, norm, cores, need_x, need_cores)
    return Gradients(grad_x, grad_mean, grad_rstd, x.new_empty(0), x.new_empty(0), grad_cores)


def _kernels(grads: list[Tensor], x: Tensor, cores: list[Tensor], need_affine: bool) -> Any:
    fast: Any = kernels("norm_rotate", x.device)
    if need_affine or fast is None or not fast.fits(x, cores, grads[0].dtype, grads):
        return None
    return fast


def _added(grads: list[Tensor], cores: int) -> list[Tensor]:
    """One gradient for each core: the sum over its readers."""
    readers = len(grads) // cores
    if readers == 1:
        return grads
    return [torch.stack(grads[i : i + readers]).sum(0) for i in range(0, len(grads), readers)]


def _in_parts(
    grads: list[Tensor],
    x: Tensor,
    norm: Norm,
    cores: list[Tensor],
    need_x: bool,
    need_affine: bool,
    need_cores: bool,
) -> Gradients:
    y = normed(x, norm, grads[0].dtype)
    turned, grad_cores = rotate_group_grad(grads, y, cores, need_x or need_affine, need_cores)
    grad_x, grad_mean, grad_rstd, grad_weight, grad_bias = (x.new_empty(0) for _ in range(5))
    centred = _centred(x, norm.mean)
    turned, rstd = turned.to(centred.dtype), norm.rstd.to(centred.dtype)
    if need_affine and norm.weight is not None:
        grad_weight = _columns(turned * centred * rstd).to(norm.weight.dtype)
    if need_affine and norm.bias is not None:
        grad_bias = _columns(turned).to(norm.bias.dtype)
    if need_x:
        scaled = turned if norm.weight is None else turned * norm.weight
        grad_rstd = (scaled * centred).sum(-1, keepdim=True).to(norm.rstd.dtype)
        scaled = scaled * rstd
        grad_x = scaled.to(x.dtype)
        if norm.mean is not None:
            grad_mean = -scaled.sum(-1, keepdim=True).to(norm.mean.dtype)
    return Gradients(grad_x, grad_mean, grad_rstd, grad_weight, grad_bias, grad_cores)


NORM_ROTATE_GRAD = define(
    "norm_rotate_grad(Tensor[] grads, Tensor x, Tensor[] cores, bool need_x, bool need_affine, "
    f"bool need_cores, {_NORM}, bool shares=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _norm_rotate_grad,
)
"""[`norm_rotate_grad`][oftfx.ops.norm_rotate_grad], of cores that need it in shares too.

These are of all cores together, one tensor, (k, cores, n, b, b).
"""


@torch.library.register_fake("oftfx::norm_rotate_grad", lib=LIBRARY)
def _(
    grads: list[Tensor],
    x: Tensor,
    cores: list[Tensor],
    need_x: bool,
    need_affine: bool,
    need_cores: bool,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shares: bool = False,
) -> Gradients:
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return x.new_empty(0)
        return tensor.new_empty(tensor.shape)

    grad_cores = [core.new_empty(core.shape if need_cores else 0) for core in cores]
    if shares:
        fast = _kernels(grads, x, cores, need_affine)
        norm = Norm(mean, rstd, weight, bias)
        runs = fast.runs(grads, x, norm, cores, need_x) if fast else 1
        grad_cores = [fake(runs, cores[0], len(cores))]
    return Gradients(
        like(x, need_x),
        like(mean, need_x),
        like(rstd, need_x),
        like(weight, need_affine),
        like(bias, need_affine),
        grad_cores,
    )


def normed(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """``(x − mean)·rstd·weight + bias``, rounded once."""
    y = _centred(x, norm.mean)
    y = y * norm.rstd.to(y.dtype)
    if norm.weight is not None:
        y *= norm.weight
    if norm.bias is not None:
        y += norm.bias
    return y.to(dtype)


def _centred(x: Tensor, mean: Tensor | None) -> Tensor:
    """``x − mean``, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if mean is None else x - mean


def _columns(x: Tensor) -> Tensor:
    """The sum of every column."""
    return x.reshape(-1, x.shape[-1]).sum(0)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, readers: int, x: Tensor, *given: Any
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *given)
        norm, cores = given[:4], list(given[4:])
        return tuple(_read(call(NORM_ROTATE, x, cores, dtype, 1, *norm), readers))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *given = ctx.saved_tensors
        norm, cores = given[:4], given[4:]
        _, _, *wanted = ctx.needs_input_grad
        needs = any(wanted[:3]), any(wanted[3:5]), any(wanted[5:])
        *found, grad_cores = NORM_ROTATE_GRAD(list(grads), x, cores, *needs, *norm)
        pairs = zip((*found, *grad_cores), wanted, strict=True)
        return None, None, *(grad if want else None for grad, want in pairs)


def _read(outs: list[Tensor], readers: int) -> list[Tensor]:
    """Each of them, ``readers`` times."""
    return [each for out in outs for each in (out, *(out.view_as(out) for _ in range(readers - 1)))]


def _apply(
    x: Tensor, cores: list[Tensor], dtype: torch.dtype, readers: int, *norm: Tensor | None
) -> list[Tensor]:
    return list(_NormRotate.apply(dtype, readers, x, *norm, *cores))


differentiate(NORM_ROTATE, _apply)
