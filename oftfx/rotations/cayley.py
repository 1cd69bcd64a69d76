"""SO(b) from a skew matrix: exact Cayley and Cayley–Neumann, in residual form.

Conventions of the whole package: a block's parameters are the strict upper triangle of U, row by
row, ``Q = U − Uᵀ``, and a *core* is ``T − I``, so that the identity is exactly zero in every dtype.
All functions are batched: the series over one leading axis, the others over any number.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DISC = 0.9
"""Where the guards take over: the series converges for ‖Q‖₂ < 1 only."""


class Layout(NamedTuple):
    """Where a skew matrix of width b keeps its parameters.

    Attributes:
        place: (b, b), which parameter an entry shows (any, on the diagonal).
        sign: (b, b), with which sign: +1 above the diagonal, 0 on it, −1 below.
        upper: (b(b−1)/2,), the entries above the diagonal in the flattened matrix, in order.
    """

    place: Tensor
    sign: Tensor
    upper: Tensor


def layout(block_size: int, device: torch.device) -> Layout:
    """The layout of skew matrices of this width."""
    b = block_size
    i = torch.arange(b, device=device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    place = (low * (2 * b - low - 1) // 2 + high - low - 1).clamp_min(0)
    rows, cols = torch.triu_indices(b, b, 1, device=device)
    return Layout(place, torch.sign(i - i[:, None]), rows * b + cols)


def skew(theta: Tensor, block_size: int, known: Layout | None = None) -> Tensor:
    """Unpacks ``(…, b(b−1)/2)`` parameters to skew matrices ``(…, b, b)``."""
    place, sign, _ = known or layout(block_size, theta.device)
    # A gather, not a scatter: exported graphs hold functional ops only.
    return theta[..., place] * sign.to(theta.dtype)


def skew_grad(grad: Tensor, known: Layout | None = None) -> Tensor:
    """Gradient of [`skew`][oftfx.rotations.cayley.skew]: ``(…, b, b)`` to ``(…, b(b−1)/2)``."""
    _, _, upper = known or layout(grad.shape[-1], grad.device)
    return (grad - grad.mT).flatten(-2)[..., upper]


def neumann(q: Tensor, order: int) -> Tensor:
    """The series' core ``2Q + … + 2Q^k + Q^{k+1}`` by Horner's rule in Q².

    Two matmuls for k = 2 and 3, three for k = 4 and 5. The distance from the exact core is
    ``‖Q‖₂^{k+1}``, as an equality (``R − R_k = Q^{k+1}R``).
    """
    square = q @ q
    value = torch.add(square, q, alpha=2) if order % 2 else q
    if order > 1:
        repeated = 2 * (q + square)
        for _ in range(order // 2):
            value = torch.baddbmm(repeated, square, value)
    return value


def neumann_grad(q: Tensor, order: int, grad: Tensor) -> Tensor:
    """Gradient of [`neumann`][oftfx.rotations.cayley.neumann] with respect to a skew ``q``.

    Right up to a symmetric part, which a skew matrix's parameters do not see. With ``S = Q²`` the
    series is ``Σ eₘSᵐ + Q·Σ oₘSᵐ``, its factors 2 but for the last; from ``G = grad``,
    ``B = G + Gᵀ``, ``Y = (G − Gᵀ)Q`` and ``Z = Y + Yᵀ`` they see

        2G + XQ,    X = Σₘ (oₘ Y Sᵐ⁻¹ + Σ_{i+j=m−1} Sⁱ (oₘ Z − 2eₘ B) Sʲ) / 2

    by what ``Qᵀ = −Q`` makes equal of the chain rule's terms. Five matmuls for k = 3 and 4, by
    Horner's rule in S from both sides: ``right`` has the powers behind, ``left`` those before.
    """
    both, y = grad + grad.mT, (grad - grad.mT) @ q
    z = y + y.mT
    odd, even = (0.0, 1.0) if order % 2 else (0.5, 2.0)
    left = inner = odd * z - even * both
    right = inner + odd * y
    if order > 2:
        square, rest = q @ q, z + y - 2 * both
        for _ in range((order - 1) // 2 - 1):
            inner = torch.baddbmm(rest - y, inner, square)
            right = torch.baddbmm(rest, right, square)
            left = torch.baddbmm(inner, square, left)
        right = torch.baddbmm(torch.baddbmm(rest, right, square), square, left)
    return torch.baddbmm(2 * grad, right, q)


def exact(q: Tensor) -> Tensor:
    """The exact core ``(I+Q)(I−Q)⁻¹ − I = 2(I−Q)⁻¹Q``."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye - q, 2 * q).contiguous()  # it answers column by column


def exact_grad(core: Tensor, grad: Tensor) -> Tensor:
    """Gradient of [`exact`][oftfx.rotations.cayley.exact] with respect to ``q``, from its value.

    ``dR = (I+R) dQ (I−Q)⁻¹`` and ``(I−Q)⁻¹ = (I+R)/2``, so no second solve is needed.
    """
    both = core + 2 * torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    return both.mT @ grad @ both.mT / 2


def spectral_norm(q: Tensor, multiplicity: int = 2, squarings: int = 8) -> Tensor:
    """``‖Q‖₂`` of skew matrices ``(…, b, b)`` to within 0.7 % at b = 64, never below it.

    The singular values of a skew matrix come in pairs; those of any other matrix, of
    ``multiplicity`` 1, may not. Each squaring more halves the distance.
    """
    # Divided by its largest entry: the squares of a tiny or a diverged Q leave float32's range.
    tiny = torch.finfo(q.dtype).tiny
    scale = q.detach().abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    norm = dominant((q / scale).mT @ (q / scale), multiplicity, squarings).sqrt() * scale[..., 0, 0]
    return norm.where((q != 0).any(-1).any(-1), 0)


def dominant(matrix: Tensor, multiplicity: int = 2, squarings: int = 8) -> Tensor:
    """The largest eigenvalue of matrices ``(…, b, b)`` whose eigenvalues are ≥ 0.

    Where they come in pairs, of ``multiplicity`` 2, ``λ^p ≤ tr(A^p)/2``, and squaring A repeatedly
    makes that tight (a factor of at most ``(b/2)^{1/p}``). Matmuls only: no decomposition and no
    synchronisation with the host.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    power = matrix
    log_trace = torch.zeros(matrix.shape[:-2], dtype=matrix.dtype, device=matrix.device)
    for step in range(squarings + 1):
        if step:
            power, log_trace = power @ power, 2 * log_trace
        trace = power.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(tiny)
        power, log_trace = power / trace[..., None, None], log_trace + trace.log()
    value = ((log_trace - math.log(multiplicity)) / 2**squarings).exp()
    return value.where((matrix != 0).any(-1).any(-1), 0)


def orthogonality_error(norm: Tensor, order: int | None) -> Tensor:
    """``‖RᵀR − I‖₂`` from ``‖Q‖₂``, as an equality; zero for the exact transform.

    With m = k+1, ``R_k = (I − Q^m)R`` and ``R_kᵀR_k − I`` has size θ^{2m} for even k. For odd k
    the eigenvalues of Q^m are ±θ^m, the sign alternating with k, hence ``(1 ∓ θ^m)² − 1``.
    Beyond ‖Q‖₂ = 1, where a smaller angle may be the worse one, it is an upper bound.
    """
    if order is None:
        return torch.zeros_like(norm)
    power = norm ** (order + 1)
    if order % 2 == 0:
        return power**2
    sign = 1 if (order + 1) % 4 == 0 else -1
    error = (power**2 - 2 * sign * power).abs()
    return error.where(power <= 1, error.clamp_min(1))


def doubled_error(norm: Tensor, order: int) -> Tensor:
    """``‖RᵀR − I‖₂`` from ``‖Q‖₂`` where the series ends with ``2Q^{k+1}``, as an equality.

    With n = k+2, ``(I − Q)R = I + Q − 2Q^n``. An eigenvalue iθ of Q gives
    ``|r|² − 1 = 4(θ^{2n} − Re((1 − iθ)(iθ)^n)) / (1 + θ²)``.
    """
    n = order + 2
    odd = n % 2
    sign = -1 if (n + odd) % 4 else 1
    real = (-sign if odd else sign) * norm ** (n + odd)
    return 4 * (norm ** (2 * n) - real).abs() / (1 + norm**2)
