"""SO(b) from a skew matrix: exact Cayley and Cayley–Neumann, in residual form.

Conventions of the whole package: a block's parameters are the strict upper triangle of U, row by
row, ``Q = U − Uᵀ``, and a *core* is ``T − I``, so that the identity is exactly zero in every dtype.
All functions are batched over the leading axis of blocks, n.
"""

import functools
import math

import torch
from torch import Tensor

DISC = 0.9
"""Where the guards take over: the series converges for ‖Q‖₂ < 1 only."""


def skew(theta: Tensor, block_size: int) -> Tensor:
    """Unpacks ``(n, b(b−1)/2)`` parameters to skew matrices ``(n, b, b)``."""
    # A gather, not a scatter: exported graphs hold functional ops only.
    b = block_size
    i = torch.arange(b, device=theta.device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    place = (low * (2 * b - low - 1) // 2 + high - low - 1).clamp_min(0)
    sign = torch.sign(i - i[:, None]).to(theta.dtype)
    return theta[:, place] * sign


def skew_grad(grad: Tensor) -> Tensor:
    """Gradient of [`skew`][oftfx.rotations.cayley.skew]: ``(n, b, b)`` to ``(n, b(b−1)/2)``."""
    rows, cols = torch.triu_indices(grad.shape[-1], grad.shape[-1], 1, device=grad.device)
    return (grad - grad.mT)[:, rows, cols]


def neumann(q: Tensor, order: int) -> Tensor:
    """The series' core ``2Q + … + 2Q^k + Q^{k+1}`` by Paterson–Stockmeyer.

    Its distance from the exact core is ``‖Q‖₂^{k+1}``, as an equality (``R − R_k = Q^{k+1}R``).
    """
    powers, chunks = _powers_and_chunks(q, order)
    value = chunks[-1]
    for chunk in reversed(chunks[:-1]):
        value = chunk + powers[-1] @ value
    return value


def neumann_grad(q: Tensor, order: int, grad: Tensor) -> Tensor:
    """Gradient of [`neumann`][oftfx.rotations.cayley.neumann] with respect to ``q``."""
    powers, chunks = _powers_and_chunks(q, order)
    size, top = len(powers), powers[-1]
    values = [chunks[-1]]  # Horner's partial values, innermost first
    for chunk in reversed(chunks[1:-1]):
        values.append(chunk + top @ values[-1])

    grad_powers = [torch.zeros_like(q) for _ in powers]
    for j in range(len(chunks)):
        for i, coefficient in enumerate(_coefficients(order, size)[j]):
            grad_powers[i] = grad_powers[i] + coefficient * grad
        if j < len(chunks) - 1:
            grad_powers[-1] = grad_powers[-1] + grad @ values[-1 - j].mT
            grad = top.mT @ grad
    for i in range(size - 1, 0, -1):  # powers[i] = powers[i − 1] @ q
        grad_powers[i - 1] = grad_powers[i - 1] + grad_powers[i] @ q.mT
        grad_powers[0] = grad_powers[0] + powers[i - 1].mT @ grad_powers[i]
    return grad_powers[0]


def exact(q: Tensor) -> Tensor:
    """The exact core ``(I+Q)(I−Q)⁻¹ − I = 2(I−Q)⁻¹Q``."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye - q, 2 * q)


def exact_grad(core: Tensor, grad: Tensor) -> Tensor:
    """Gradient of [`exact`][oftfx.rotations.cayley.exact] with respect to ``q``, from its value.

    ``dR = (I+R) dQ (I−Q)⁻¹`` and ``(I−Q)⁻¹ = (I+R)/2``, so no second solve is needed.
    """
    both = core + 2 * torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    return both.mT @ grad @ both.mT / 2


def spectral_norm(q: Tensor, squarings: int = 8) -> Tensor:
    """``‖Q‖₂`` of skew matrices ``(n, b, b)`` to within 0.7 % at b = 64, never below it.

    The singular values of a skew matrix come in pairs, so ``‖Q‖₂^{2p} ≤ tr((QᵀQ)^p)/2``; squaring
    ``QᵀQ`` repeatedly makes that tight (a factor of at most ``(b/2)^{1/2p}``). Matmuls only:
    no SVD and no synchronisation with the host.
    """
    tiny = torch.finfo(q.dtype).tiny
    power = q.mT @ q
    log_trace = torch.zeros(q.shape[:-2], dtype=q.dtype, device=q.device)
    for step in range(squarings + 1):
        if step:
            power, log_trace = power @ power, 2 * log_trace
        trace = power.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(tiny)
        power, log_trace = power / trace[..., None, None], log_trace + trace.log()
    norm = ((log_trace - math.log(2)) / 2 ** (squarings + 1)).exp()
    return norm.where((q != 0).any(-1).any(-1), 0)


def orthogonality_error(norm: Tensor, order: int | None) -> Tensor:
    """``‖RᵀR − I‖₂`` from ``‖Q‖₂``, as an equality; zero for the exact transform.

    With m = k+1, ``R_k = (I − Q^m)R`` and ``R_kᵀR_k − I`` has size θ^{2m} for even k. For odd k
    the eigenvalues of Q^m are ±θ^m, the sign alternating with k, hence ``(1 ∓ θ^m)² − 1``.
    """
    if order is None:
        return torch.zeros_like(norm)
    power = norm ** (order + 1)
    if order % 2 == 0:
        return power**2
    sign = 1 if (order + 1) % 4 == 0 else -1
    return (power**2 - 2 * sign * power).abs()


@functools.cache
def _coefficients(order: int, size: int) -> tuple[tuple[float, ...], ...]:
    """Coefficients of Q, Q², … Q^{k+1} in chunks of ``size``: 2, …, 2, 1."""
    flat = (2.0,) * order + (1.0,)
    return tuple(flat[i : i + size] for i in range(0, len(flat), size))


def _powers_and_chunks(q: Tensor, order: int) -> tuple[list[Tensor], list[Tensor]]:
    """``[Q … Q^s]`` and the chunks ``B_j = Σ c_{sj+i}Q^i``; the series is ``Σ_j (Q^s)^j B_j``."""
    size = 1
    while size * size < order + 1:
        size += 1
    powers = [q]
    while len(powers) < size:
        powers.append(powers[-1] @ q)
    chunks = []
    for coefficients in _coefficients(order, size):
        chunk = coefficients[0] * powers[0]
        for coefficient, power in zip(coefficients[1:], powers[1:], strict=False):
            chunk = chunk + coefficient * power
        chunks.append(chunk)
    return powers, chunks
