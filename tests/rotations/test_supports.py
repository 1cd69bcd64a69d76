"""Supports are orthonormal and are the subspaces they are said to be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from oftfx import OftfxWarning
from oftfx.rotations import supports
from oftfx.rotations.supports import OVERSAMPLING
from oftfx.testing import tolerance

FIND = {"randomized": supports.principal, "full": supports.principal_exact}
every_way = pytest.mark.parametrize("find", FIND.values(), ids=FIND)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(out: int, width: int, decay: float = 0.0, dtype: torch.dtype = torch.float64):
    """A random matrix whose i-th singular value is about ``(i+1)^-decay``."""
    u = torch.linalg.qr(torch.randn(out, min(out, width), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(width, min(out, width), dtype=torch.float64)).Q
    values = torch.arange(1, min(out, width) + 1, dtype=torch.float64) ** -decay
    return ((u * values) @ v.mT).to(dtype)


def is_orthonormal(support: torch.Tensor) -> bool:
    eye = torch.eye(len(support), dtype=support.dtype)
    return bool((support @ support.mT - eye).norm() <= tolerance(support.dtype) * len(support))


def sine(support: torch.Tensor, reference: torch.Tensor) -> float:
    """Of the largest angle between two subspaces of one size."""
    missed = reference - (reference @ support.mT) @ support
    return float(torch.linalg.matrix_norm(missed.double(), ord=2))


def gap(weight: torch.Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(weight)
    return float(values[rank + OVERSAMPLING] / values[rank - 1])


@pytest.mark.parametrize("iterations", [2, supports.ITERATIONS, 8])
@pytest.mark.parametrize(("decay", "rank"), [(0.5, 12), (1.0, 8), (2.0, 5)])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_randomised_vectors_come_as_close_as_subspace_iteration_says(
    shape, decay, rank, iterations, monkeypatch
):
    """The angle shrinks with the ratio of singular values past the oversampling, to the 2q."""
    monkeypatch.setattr(supports, "ITERATIONS", iterations)
    weight = matrix(*shape, decay)
    exact = supports.principal_exact(weight, rank, generator())
    found = supports.principal(weight, rank, generator())
    law = gap(weight, rank) ** (2 * iterations)
    assert is_orthonormal(found)
    assert sine(found, exact) <= 5 * law + 1e-12  # where the law is below what float64 can tell
    kept, best = (float((weight @ p.mT).norm()) for p in (found, exact))
    assert best * (1 - law**2 - 1e-12) <= kept <= best * (1 + 1e-12)


@every_way
@given(out=st.integers(1, 12), width=st.integers(2, 12), data=st.data(), rank_of=st.integers(0, 12))
def test_rows_are_orthonormal_whatever_the_rank_of_the_weight(find, out, width, data, rank_of):
    rank = data.draw(st.integers(2, width))
    torch.manual_seed(rank_of)
    weight = torch.randn(out, rank_of, dtype=torch.float64) @ torch.randn(
        rank_of, width, dtype=torch.float64
    )
    support = find(weight, rank, generator())
    assert support.shape == (rank, width)
    assert is_orthonormal(support)
    if rank >= min(rank_of, out):  # then all that W sees is within
        assert float((weight - (weight @ support.mT) @ support).norm()) <= 1e-9 * (
            1 + float(weight.norm())
        )


@every_way
def test_the_rows_come_by_falling_singular_value(find):
    weight = matrix(40, 30, 1.0)
    sizes = (weight @ find(weight, 6, generator()).mT).norm(dim=0)
    torch.testing.assert_close(sizes, torch.linalg.svdvals(weight)[:6], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_seed_gives_the_same_directions(dtype):
    weight = matrix(24, 32, 0.5, dtype)
    for find in (lambda g: supports.principal(weight, 4, g), lambda g: supports.random(32, 4, g)):
        assert torch.equal(find(generator(3)), find(generator(3)))
    assert supports.principal(weight, 4, generator()).dtype == dtype
    assert not torch.equal(
        supports.random(32, 4, generator(3)), supports.random(32, 4, generator(4))
    )


def test_random_directions_prefer_no_coordinate():
    """E(P_ij²) = 1/d for a uniformly random subspace."""
    found = torch.cat([supports.random(6, 2, generator(seed)) for seed in range(2000)])
    assert is_orthonormal(supports.random(6, 2, generator()))
    torch.testing.assert_close(
        found.square().mean(0), torch.full((6,), 1 / 6, dtype=torch.float64), rtol=0.05, atol=0
    )


def test_coordinates_are_distinct_unit_vectors():
    support = supports.coordinate(9, 9, generator())
    assert torch.equal(support.sum(0), torch.ones(9).double())
    assert torch.equal(support.sum(1), torch.ones(9).double())
    assert supports.coordinate(9, 4, generator()).sum() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "rank", "decay"), [
    ((160, 160), 9, 0.0), ((160, 160), 9, 1.0), ((120, 200), 20, 0.5), ((200, 120), 4, 3.0)
])  # fmt: skip
def test_full_is_the_whole_decomposition(shape, rank, decay, dtype):
    """Up to what the distance of the next singular value allows to tell."""
    torch.manual_seed(0)
    weight = matrix(*shape, decay, dtype) if decay else torch.randn(shape, dtype=dtype)
    found = supports.principal_exact(weight, rank, generator())
    _, values, rows = torch.linalg.svd(weight.double())
    assert is_orthonormal(found)
    apart = float((values[rank - 1] - values[rank]) / values[0])
    off = 2 * supports.ROUNDINGS * torch.finfo(dtype).eps
    assert sine(found.double(), rows[:rank]) <= off / apart
    kept = torch.linalg.svdvals(weight.double() @ found.double().mT)
    torch.testing.assert_close(kept, values[:rank], rtol=0, atol=off * float(values[0]))


def test_full_of_equal_singular_values_ends():
    weight = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64)).Q
    found = supports.principal_exact(weight, 5, generator())
    assert is_orthonormal(found)


def test_full_says_when_it_is_not_done(monkeypatch):
    monkeypatch.setattr(supports, "STEPS", 2)
    with pytest.warns(OftfxWarning, match="after 2 steps"):
        supports.principal_exact(torch.randn(100, 100, dtype=torch.float64), 5, generator())


@every_way
def test_never_a_matrix_as_wide_as_a_square_weight(find):
    weight = torch.randn(768, 768)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        find(weight, 8, generator())
    largest = max(event.self_cpu_memory_usage for event in measured.events())
    assert 0 < largest < weight.nbytes / 4
