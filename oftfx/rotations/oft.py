"""OFT: a block-diagonal rotation, the parameters of each block a skew matrix."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from oftfx import ops
from oftfx.ops.factor import Factor
from oftfx.ops.rotate import ROTATE
from oftfx.rotations import cayley
from oftfx.spec import COFT, OFT, Spec

FIXED: frozenset[str] = frozenset()


class Blocks(Protocol):
    """A spec whose rotations come from blocks of skew matrices."""

    @property
    def block_size(self) -> int:
        """Width of a block."""

    @property
    def order(self) -> int:
        """The series' k."""

    @property
    def exact(self) -> bool:
        """Whether the exact transform is used."""

    @property
    def guard(self) -> str | None:
        """What to do near ‖Q‖₂ = 1."""

    @property
    def unit_rate(self) -> bool:
        """Whether Q is in units of an angle, whatever the block size."""


def shapes(spec: OFT, width: int) -> dict[str, tuple[int, ...]]:
    """Shape of a site's parameters: ``(width/b, b(b−1)/2)``, or ``(1, …)`` for all blocks."""
    b = spec.block_size
    return {"theta": (1 if spec.share_blocks else width // b, b * (b - 1) // 2)}


def misfit(spec: OFT, width: int) -> str | None:
    """Why this spec cannot rotate an input of this width, and what would; None when it can."""
    b = spec.block_size
    if width % b == 0:
        return None
    divisors = [d for d in range(2, width + 1) if width % d == 0]
    near = sorted(sorted(divisors, key=lambda d: abs(d - b))[:3])
    return f"block_size={b} does not divide its input width {width} (near divisors: {near})"


def start(spec: OFT, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The identity, or skew entries of the spec's standard deviation."""
    return {"theta": around_zero(spec, shapes(spec, width)["theta"], generator)}


def cores(tensors: Mapping[str, Tensor], spec: OFT) -> tuple[Tensor]:
    """The residual blocks ``R_i − I``, ``(…, n, b, b)``, at least float32."""
    return (blocks(tensors["theta"], spec),)


def series(spec: Spec) -> tuple[int, int] | None:
    """Block size and order, where the cores are the series of the parameters and nothing else."""
    if not isinstance(spec, OFT) or spec.exact or spec.guard or spec.unit_rate or spec.doubled:
        return None
    return spec.block_size, spec.order


def factors(cores: Sequence[Any], spec: OFT) -> tuple[Factor]:
    """One block-diagonal factor."""
    return (Factor(ROTATE, (cores[0],)),)


def health(tensors: Mapping[str, Tensor], spec: OFT) -> tuple[Tensor, Tensor]:
    """‖Q‖₂ and, by the error law, ‖RᵀR − I‖₂ of the worst block."""
    norms = norm(tensors["theta"], spec)
    if spec.doubled:
        return norms.amax(-1), cayley.doubled_error(norms, spec.order).amax(-1)
    return norms.amax(-1), orthogonality_error(norms, spec).amax(-1)


def dropped(core: Tensor, rate: float, width: int) -> Tensor:
    """The blocks ``(n, b, b)`` of a site, each the identity with this probability.

    Drawn from torch's own generator, one number a block, also where all blocks share parameters.
    """
    blocks = width // core.shape[-1]
    kept = torch.rand(blocks, 1, 1, device=core.device) >= rate
    return core * kept.to(core.dtype)


def projected(tensors: Mapping[str, Tensor], spec: COFT) -> dict[str, Tensor]:
    """The parameters with every ``‖Q_i‖_F`` at most ``eps / √n``; unchanged where it is already.

    Within the rounding of the parameters' own dtype, so that projecting twice is projecting once.
    """
    theta = tensors["theta"]
    wide = theta.to(torch.promote_types(theta.dtype, torch.float32))
    norm = math.sqrt(2) * rate(spec) * torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    most = spec.eps / math.sqrt(theta.shape[-2])
    inside = norm <= most * (1 + torch.finfo(theta.dtype).eps)
    return {"theta": torch.where(inside, theta, (wide * (most / norm)).to(theta.dtype))}


def around_zero(spec: Spec, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Zeros, or numbers of the spec's standard deviation, float64."""
    if not spec.init_std:
        return torch.zeros(shape, dtype=torch.float64, device="cpu")
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * spec.init_std
    )


def rate(spec: Blocks) -> float:
    """What a parameter is multiplied by to be an entry of Q.

    With entries of at most e, ``‖Q‖₂ ≤ e(b − 1)``, the largest sum of a row, whatever their signs:
    R turns by at most ``2e(b − 1)``, which in these units is e. Entries of one sign come near it:
    their ``‖Q‖₂ = e·cot(π/2b)`` falls from that bound at b = 2 to 2/π of it for wide blocks.
    """
    return 0.5 / (spec.block_size - 1) if spec.unit_rate else 1.0


def entries(theta: Tensor, spec: Blocks) -> Tensor:
    """The entries of Q above the diagonal."""
    return wide(theta) * rate(spec) if spec.unit_rate else theta


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def core(theta: Tensor, spec: Blocks) -> Tensor:
    """The residual blocks ``R_i − I``, ``(…, n, b, b)``, at least float32."""
    b, order = spec.block_size, None if spec.exact else spec.order
    theta = entries(theta, spec)
    if spec.guard is None or spec.exact:
        return ops.cayley(theta, b, order)

    norm = ops.spectral_norm(cayley.skew(theta.detach().float(), b))
    outside = (norm > cayley.DISC)[..., None]
    if spec.guard == "exact":
        return torch.where(
            outside[..., None], ops.cayley(theta, b, None), ops.cayley(theta, b, order)
        )
    # The inner where keeps the norm's gradient finite for the blocks that are not rescaled.
    safe = torch.where(outside, theta, torch.ones_like(theta))
    scale = cayley.DISC / ops.spectral_norm(cayley.skew(safe, b))
    return ops.cayley(torch.where(outside, theta * scale[..., None], theta), b, order)


def blocks(theta: Tensor, spec: OFT) -> Tensor:
    """[`core`][oftfx.rotations.oft.core], with the series' last power once more where asked for."""
    if not spec.doubled:
        return core(theta, spec)
    q = cayley.skew(wide(entries(theta, spec)), spec.block_size)
    return core(theta, spec) + torch.linalg.matrix_power(q, spec.order + 1)


def norm(theta: Tensor, spec: Blocks) -> Tensor:
    """``‖Q_i‖₂`` per block, ``(…, n)``, of the skew matrices the core is made from."""
    value = cayley.spectral_norm(cayley.skew(entries(theta, spec), spec.block_size))
    return value.clamp_max(cayley.DISC) if spec.guard == "rescale" and not spec.exact else value


def orthogonality_error(norm: Tensor, spec: Blocks) -> Tensor:
    """``‖R_iᵀR_i − I‖₂`` per block from [`norm`][oftfx.rotations.oft.norm], by the error law."""
    error = cayley.orthogonality_error(norm, None if spec.exact else spec.order)
    return error.where(norm <= cayley.DISC, 0) if spec.guard == "exact" else error
