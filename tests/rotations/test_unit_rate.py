"""`unit_rate`: a learning rate is an angle, whatever the block size or the rank."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import oftfx
from oftfx import BOFT, COFT, LOFT, OFT, PSOFT, testing
from oftfx.modules import built
from oftfx.rotations import cayley, method_of, oft, projection_of
from tests.small import rows, small

SIZES = [8, 16, 32, 64, 128, 256]


def after_one_step(spec: OFT, lr: float, gradient: torch.Tensor) -> torch.Tensor:
    """Q after Adam's first step, which moves every entry by the learning rate."""
    theta = torch.zeros_like(gradient, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=lr, eps=0.0)
    theta.grad = gradient
    optimizer.step()
    return cayley.skew(oft.entries(theta.detach(), spec), spec.block_size)


@pytest.mark.parametrize("b", [2, 3, *SIZES])
def test_a_step_turns_no_direction_by_more_than_its_learning_rate(b):
    spec, lr = OFT(block_size=b, unit_rate=True, dtype=torch.float64), 0.01
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(16, b * (b - 1) // 2, generator=generator, dtype=torch.float64)
    for signs in (gradient, gradient.abs()):
        norm = torch.linalg.matrix_norm(after_one_step(spec, lr, signs), ord=2)
        assert (2 * norm.arctan() <= lr).all()


@pytest.mark.parametrize("b", [3, *SIZES])
def test_a_step_of_one_sign_turns_as_far_for_every_block_size(b):
    """Between 2/π and 1 of the learning rate; within 13 % of each other from b = 8 on."""
    spec = OFT(block_size=b, unit_rate=True, dtype=torch.float64)
    gradient = torch.ones(1, b * (b - 1) // 2, dtype=torch.float64)
    norm = torch.linalg.matrix_norm(after_one_step(spec, 1e-3, gradient), ord=2).item()
    assert norm == pytest.approx(5e-4 / math.tan(math.pi / (2 * b)) / (b - 1))
    assert 2 / math.pi <= norm / 5e-4 <= (0.72 if b >= 8 else 1)


@pytest.mark.parametrize("rank", [2, 7, 64])
def test_a_free_core_moves_no_direction_by_more_than_the_learning_rate(rank):
    spec = LOFT(rank=rank, support="random", core="free", unit_rate=True, dtype=torch.float64)
    tensors = {"kernel": torch.full((rank, rank), 0.01), "support": torch.eye(rank)}
    _, kernel = method_of(spec).cores(tensors, spec)
    assert torch.linalg.matrix_norm(kernel, ord=2).item() == pytest.approx(0.01)


def test_losses_of_all_block_sizes_fall_alike():
    """At one learning rate; without the units, wider blocks run ahead."""
    width = 128

    def losses(b: int, unit_rate: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 8))
        x, labels = torch.randn(64, width), torch.randint(8, (64,))
        oftfx.adapt(model, OFT(block_size=b, unit_rate=unit_rate), example_inputs=x)
        # Equal at b = 8.
        lr = 0.05 if unit_rate else 0.05 / (2 * (8 - 1))
        optimizer = torch.optim.Adam(oftfx.parameters(model), lr=lr)
        out = []
        for _ in range(15):
            loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            out.append(loss.item())
        return torch.tensor(out)

    def spread(unit_rate: bool) -> float:
        curves = torch.stack([losses(b, unit_rate) for b in (8, 32, 128)])
        assert (curves[:, -1] < 0.95 * curves[:, 0]).all()
        return ((curves.amax(0) - curves.amin(0)) / curves.amin(0)).max().item()

    assert spread(unit_rate=True) < 0.1
    assert spread(unit_rate=False) > 0.5


SPECS = {
    "OFT": OFT(block_size=4, unit_rate=True),
    "OFT, guarded": OFT(block_size=4, unit_rate=True, guard="rescale"),
    "BOFT": BOFT(block_size=4, factors=2, unit_rate=True),
    "PSOFT": PSOFT(rank=4, unit_rate=True),
    "LOFT, free": LOFT(rank=4, support="random", core="free", unit_rate=True),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@every_spec
def test_it_only_changes_the_units(spec, tmp_path):
    """The map, health, folds and what is saved are those of parameters that much smaller."""
    plain, scaled = (
        oftfx.adapt(
            small("mlp"),
            dataclasses.replace(spec, dtype=torch.float64, unit_rate=unit_rate),
            example_inputs=rows(),
        )
        for unit_rate in (False, True)
    )
    testing.randomize(scaled, std=2.0)
    rate = 1 / 4 if spec == SPECS["LOFT, free"] else 1 / (2 * 3)
    with torch.no_grad():
        for (name, ours), theirs in zip(
            testing.thetas(plain).items(), testing.thetas(scaled).values(), strict=True
        ):
            units = rate if name.endswith(("theta", "kernel")) else 1
            ours.copy_(theirs * units)
    testing.assert_same_function(scaled, plain, rows(), grad=False)
    torch.testing.assert_close(oftfx.health(scaled).norm, oftfx.health(plain).norm)
    testing.assert_folds(scaled, rows())
    oftfx.save(scaled, tmp_path)
    testing.assert_same_function(oftfx.load(small("mlp"), tmp_path), scaled, rows())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_bound_on_q_is_one_on_q(dtype):
    spec = COFT(block_size=8, eps=0.3, unit_rate=True, dtype=dtype)
    theta = torch.randn(4, 28, generator=torch.Generator().manual_seed(0)).to(dtype)
    projection = projection_of(spec)
    inside = projection({"theta": theta}, spec)
    q = cayley.skew(oft.entries(inside["theta"], spec), 8)
    norms = torch.linalg.matrix_norm(q.double())
    assert norms.max() <= 0.15 * (1 + 2 * torch.finfo(dtype).eps)
    assert norms.max() > 0.14
    again = projection(inside, spec)
    assert torch.equal(again["theta"], inside["theta"])


def test_half_precision_parameters_keep_their_digits():
    spec = OFT(block_size=4, unit_rate=True, dtype=torch.bfloat16)
    theta = torch.full((1, 6), 0.1).bfloat16()
    (core,) = built(spec, {"theta": theta})
    exact = oft.core(theta.double(), OFT(block_size=4, unit_rate=True, dtype=torch.float64))
    torch.testing.assert_close(core.double(), exact, rtol=1e-6, atol=1e-9)
