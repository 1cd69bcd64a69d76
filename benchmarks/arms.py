"""What `benchmarks/methods.py` compares: every method at about 2.4M trained numbers, and its rates.

Counts are those of SmolLM2-135M's 210 linears. GOFT's are what they are: it has no size to choose.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias
from unittest import mock

import peft
import torch
from peft.tuners.boft import layer as boft_layer
from peft.tuners.hra import layer as hra_layer
from torch import Tensor, nn

import oftfx

Batches = Sequence[dict[str, Tensor]]
Panel = Literal["methods", "variants", "PEFT", "none"]


@dataclass(frozen=True)
class Arm:
    """A method of one library with its size.

    Attributes:
        name: Library, method, size.
        make: An oftfx spec, or a function from the size to a PEFT configuration.
        rates: Peak learning rates to begin with, around the one that should gain 0.6.
        panel: Where its curve is drawn.
    """

    name: str
    make: oftfx.Spec | Callable[[], peft.PeftConfig]
    rates: tuple[float, ...]
    panel: Panel = "methods"

    @property
    def constrained(self) -> bool:
        """Whether its parameters are projected after every step."""
        return isinstance(self.make, oftfx.COFT)

    def adapt(self, model: Any, seed: int, calibration: Batches) -> nn.Module:
        """The model with this method's adapter, seeded; its base is frozen."""
        torch.manual_seed(seed)
        if isinstance(self.make, oftfx.Spec):
            spec = replace(self.make, seed=seed)
            calibrated = isinstance(spec, oftfx.LOFT) and spec.calibrated
            adapted: nn.Module = oftfx.adapt(
                model, spec, calibration=calibration if calibrated else None
            )
            return adapted
        _replace_block_op()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(model, self.make())


def _replace_block_op() -> None:
    """Gives PEFT's BOFT its block-diagonal matrices by PyTorch instead of a CUDA extension.

    Where that extension does not build, as with torch 2.11 and CUDA 13, PEFT says so and trains
    one factor, whatever was asked for.
    """
    boft_layer.get_fbd_cuda = lambda: True
    boft_layer.FastBlockDiag = SimpleNamespace(apply=block_diagonal)


def block_diagonal(blocks: Tensor) -> Tensor:
    """Blocks on the diagonal of zeros, (factors, n, b, b) to (factors, n·b, n·b)."""
    factors, n, b, _ = blocks.shape
    return blocks.permute(0, 2, 3, 1).diag_embed(dim1=1, dim2=3).reshape(factors, n * b, n * b)


def reflections_at_once() -> AbstractContextManager[Any]:
    """Within it, PEFT's HRA makes its product of reflections in one go.

    One by one, as it is timed, they take a training from one minute to five.
    """

    def whole(layer: Any, name: str, reverse: bool = False) -> Tensor:
        directions = layer.hra_u[name]
        with torch.autocast(directions.device.type, enabled=False):
            return reflections(directions.flip(1) if reverse else directions)

    return mock.patch.object(hra_layer.HRALinear, "get_delta_weight", whole)


def reflections(directions: Tensor) -> Tensor:
    """``∏(I − 2uᵢuᵢᵀ)``, (d, d), of the columns of (d, r) at length one, in their order.

    It is ``I − U T Uᵀ``, and T the inverse of ``½I`` with what ``UᵀU`` has above its diagonal.
    """
    u = directions / directions.norm(dim=0)
    half = (u.mT @ u).triu(1) + torch.eye(u.shape[1], device=u.device, dtype=u.dtype) / 2
    apart = torch.linalg.solve_triangular(half, u.mT, upper=True)
    return torch.eye(len(u), device=u.device, dtype=u.dtype) - u @ apart


LORA = Arm(
    "PEFT LoRA r8",
    lambda: peft.LoraConfig(r=8, target_modules="all-linear"),
    (1.5e-4, 3e-4, 6e-4, 1.2e-3),
)
OFT = Arm("oftfx OFT b32", oftfx.OFT(block_size=32), (5e-5, 1e-4, 2e-4, 4e-4))

OTHERS = (
    Arm("oftfx COFT b32", oftfx.COFT(block_size=32, eps=0.5), (1e-4, 2e-4, 4e-4)),
    Arm("oftfx BOFT b16 m2", oftfx.BOFT(block_size=16, factors=2), (5e-5, 1e-4, 2e-4)),
    Arm("oftfx HRA r16", oftfx.HRA(rank=16), (2.5e-5, 5e-5, 1e-4)),
    Arm("oftfx PSOFT r150", oftfx.PSOFT(rank=150), (1.25e-5, 2.5e-5, 5e-5)),
    Arm("oftfx LOFT r150", oftfx.LOFT(rank=150), (1.25e-5, 2.5e-5, 5e-5)),
    Arm("oftfx GOFT, scaled", oftfx.GOFT(scale=True), (1e-3, 2e-3, 4e-3), panel="variants"),
    Arm("oftfx QGOFT", oftfx.QGOFT(), (5e-4, 1e-3, 2e-3), panel="variants"),
    Arm(
        "oftfx LOFT r106, free core",
        oftfx.LOFT(rank=106, core="free"),
        (2.5e-5, 5e-5, 1e-4),
        panel="variants",
    ),
    Arm(
        "oftfx LOFT r150, principal",
        oftfx.LOFT(rank=150, support="principal"),
        (1.25e-5, 2.5e-5, 5e-5),
        panel="variants",
    ),
    Arm(
        "oftfx LOFT r150, random",
        oftfx.LOFT(rank=150, support="random"),
        (2.5e-5, 5e-5, 1e-4),
        panel="variants",
    ),
    Arm(
        "oftfx OFT b48, shared inputs",
        oftfx.OFT(block_size=48, share_inputs=True),
        (5e-5, 1e-4, 2e-4),
        panel="variants",
    ),
)

PEFT_OFT = Arm(
    "PEFT OFT b32",
    lambda: peft.OFTConfig(oft_block_size=32, r=0, target_modules="all-linear"),
    (5e-5, 1e-4, 2e-4, 4e-4),
    panel="PEFT",
)
PEFT_BOFT = Arm(  # trains blocks of b² numbers of which only the skew half counts, and a scale
    "PEFT BOFT b16 m2",
    lambda: peft.BOFTConfig(
        boft_block_size=16, boft_n_butterfly_factor=2, target_modules="all-linear"
    ),
    (5e-5, 1e-4, 2e-4),
    panel="PEFT",
)
PEFT_HRA = Arm(
    "PEFT HRA r16",
    lambda: peft.HRAConfig(r=16, target_modules="all-linear"),
    (2.5e-4, 5e-4, 1e-3),
    panel="PEFT",
)
PEFT_PSOFT = Arm(
    "PEFT PSOFT r150",
    lambda: peft.PsoftConfig(
        r=150, psoft_svd="lowrank", use_cayley_neumann=True, target_modules="all-linear"
    ),
    (1.25e-5, 2.5e-5, 5e-5),
    panel="PEFT",
)

OVERLAY = Arm(  # PEFT's polynomial, for the two loss curves that must lie on each other
    "oftfx OFT b32 k3", oftfx.OFT(block_size=32, order=3), (1e-4,), panel="none"
)

ARMS = (LORA, OFT, *OTHERS, PEFT_OFT, PEFT_BOFT, PEFT_PSOFT, PEFT_HRA, OVERLAY)


LEAST, MOST = 0.55, 0.62
"""The gains that every curve should lead from and to, in nats."""

SEEDS = (0, 1, 2)

RATES = 6
"""More are not tried."""

Key: TypeAlias = tuple[str, float, int]
"""Arm, rate and seed."""


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: Arm
    rate: float
    seed: int

    @property
    def key(self) -> Key:
        """What tells it from the others."""
        return self.arm.name, self.rate, self.seed


def jobs(gains: Mapping[Key, float]) -> list[Job]:
    """All trainings that are wanted, those that tell most first.

    First every method's first seed, at its rates and at as many more as its curve needs; then the
    other seeds, at the rates that the curve's telling part has, those first that take longest.

    Args:
        gains: Of the trainings that are done.
    """
    first = (LORA, OFT, OVERLAY, PEFT_OFT, PEFT_HRA, PEFT_BOFT, *OTHERS, PEFT_PSOFT)
    wanted = [Job(arm, rate, 0) for arm in first for rate in arm.rates]
    wanted += [Job(arm, rate, 0) for arm in first for rate in _further(arm, gains)]
    for group in ((PEFT_BOFT, PEFT_OFT, PEFT_PSOFT), OTHERS, (LORA, OFT), (PEFT_HRA,)):
        for seed in SEEDS[1:]:
            wanted += [Job(arm, rate, seed) for arm in group for rate in _telling(arm, gains)]
    return wanted


def _curve(arm: Arm, gains: Mapping[Key, float]) -> dict[float, float]:
    """Gains of the first seed by rising rate."""
    return {
        rate: gain
        for (name, rate, seed), gain in sorted(gains.items())
        if name == arm.name and seed == 0
    }


def _further(arm: Arm, gains: Mapping[Key, float]) -> list[float]:
    """Rates beyond those that are done, where these do not lead from LEAST to MOST or the top."""
    curve = _curve(arm, gains)
    if arm is OVERLAY or not set(arm.rates) <= set(curve) or len(curve) >= RATES:
        return []
    best, lowest, highest = max(curve, key=lambda rate: curve[rate]), min(curve), max(curve)
    further = []
    if best == lowest or not curve[lowest] < LEAST:
        further.append(lowest / 2)
    if best == highest and curve[highest] < MOST:
        further.append(highest * 2)
    return further


def _telling(arm: Arm, gains: Mapping[Key, float]) -> list[float]:
    """The rates from the last below LEAST to the first above MOST or the best."""
    curve = _curve(arm, gains)
    top = max(curve.values(), default=0)
    high = min((rate for rate, gain in curve.items() if gain >= min(MOST, top)), default=0)
    low = max((rate for rate, gain in curve.items() if gain < LEAST and rate < high), default=0)
    return [rate for rate in curve if low <= rate <= high]
