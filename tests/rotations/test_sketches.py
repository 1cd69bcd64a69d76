"""Sketches find, from what streams by, what the whole matrix would show."""

import pytest
import torch

from oftfx.rotations.sketches import PASSES, Gradient, Skew
from tests.rotations.test_supports import is_orthonormal, sine

WIDTH, OUTS, RANK = 48, {"a": 40, "b": 24}, 6
LIKE = torch.empty(0, dtype=torch.float64)


class Stream:
    """Batches of x and dy, low-rank enough for a spectrum that falls, and the sums over them."""

    def __init__(self, rows: int = 60, batches: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        scales = torch.arange(1, rows + 1, dtype=torch.float64)[:, None] ** -1.5
        self.weights = {name: normal(out, WIDTH) for name, out in OUTS.items()}
        self.batches = [
            (normal(rows, WIDTH), {name: scales * normal(rows, out) for name, out in OUTS.items()})
            for _ in range(batches)
        ]
        self.gradients = {name: sum(dys[name].mT @ x for x, dys in self.batches) for name in OUTS}

    def run(self, sketch, by_weight: bool = False):
        for number in range(PASSES):
            sketch.begin(number)
            for name, weight in self.weights.items():
                if by_weight:
                    sketch.add_weight(name, weight, self.gradients[name])
                    continue
                for x, dys in self.batches:
                    dy = dys[name]
                    sketch.add(name, x, dy if sketch.NEEDS_OUTPUT else dy @ weight)
        return sketch.result()

    @property
    def matrix_of_skew(self) -> torch.Tensor:
        products = (self.weights[name].mT @ g for name, g in self.gradients.items())
        return sum(0.5 * (m - m.mT) for m in products)

    @property
    def matrix_of_gradient(self) -> torch.Tensor:
        return torch.cat(list(self.gradients.values()))


KINDS = {
    "skew": lambda rank=RANK, seed=0: Skew(WIDTH, rank, seed, LIKE),
    "gradient": lambda rank=RANK, seed=0: Gradient(WIDTH, rank, seed, LIKE, OUTS),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def stream() -> Stream:
    return Stream()


@every_kind
@pytest.mark.parametrize("by_weight", [False, True])
def test_the_support_is_the_dense_matrixs(stream, kind, by_weight):
    found = stream.run(KINDS[kind](), by_weight)
    dense = getattr(stream, f"matrix_of_{kind}")
    _, values, rows = torch.linalg.svd(dense)
    assert found.support.shape == (RANK, WIDTH)
    assert is_orthonormal(found.support)
    assert sine(found.support, rows[:RANK]) <= 0.05
    energies = values[:RANK].square()
    assert (found.energies <= energies * (1 + 1e-12)).all()  # as Ritz values are
    assert float(found.energies.sum()) >= 0.99 * float(energies.sum())


@every_kind
def test_streaming_rows_and_whole_weights_agree(stream, kind):
    rows, weights = (stream.run(KINDS[kind](), by_weight) for by_weight in (False, True))
    torch.testing.assert_close(rows.energies, weights.energies)
    assert sine(rows.support, weights.support) <= 1e-7


@every_kind
def test_the_total_is_estimated_well_and_never_less_than_what_is_captured(stream, kind):
    dense = float(getattr(stream, f"matrix_of_{kind}").square().sum())
    totals = []
    for seed in range(40):
        found = stream.run(KINDS[kind](rank=2, seed=seed))
        assert float(found.energies.sum()) <= found.total * (1 + 1e-12)
        totals.append(found.total)
    assert sum(totals) / len(totals) == pytest.approx(dense, rel=0.02)
    assert max(abs(total - dense) for total in totals) <= 0.25 * dense


@every_kind
def test_at_full_width_it_is_exact(stream, kind):
    found = stream.run(KINDS[kind](rank=WIDTH))
    dense = getattr(stream, f"matrix_of_{kind}")
    torch.testing.assert_close(found.energies, torch.linalg.svdvals(dense).square())
    assert found.total == pytest.approx(float(dense.square().sum()))


def test_more_directions_than_the_gradient_has_rows():
    outs = {"a": 3}
    sketch = Gradient(WIDTH, 8, 0, LIKE, outs)
    gradient = torch.randn(3, WIDTH, dtype=torch.float64)
    for number in range(PASSES):
        sketch.begin(number)
        sketch.add_weight("a", gradient, gradient)
    found = sketch.result()
    assert is_orthonormal(found.support)
    torch.testing.assert_close(
        found.energies[:3], torch.linalg.svdvals(gradient).square(), rtol=1e-9, atol=0
    )
    assert not found.energies[3:].any()
    assert sine(found.support[:3], torch.linalg.svd(gradient)[2][:3]) <= 1e-9
