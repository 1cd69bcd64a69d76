"""What `benchmarks/methods.py` compares: every method at about 2.4M trained numbers, and its rates.

Counts are those of SmolLM2-135M's 210 linears. GOFT's are what they are: it has no size to choose.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import peft
import torch
from torch import nn

import oftfx

Batches = Sequence[dict[str, torch.Tensor]]
Panel = Literal["methods", "variants", "PEFT", "none"]


@dataclass(frozen=True)
class Arm:
    """A method of one library with its size.

    Attributes:
        name: Library, method, size.
        make: An oftfx spec, or a function from the size to a PEFT configuration.
        rates: Peak learning rates, the middle one expected to reach a gain of 0.6.
        seeds: How many of them to run.
        panel: Where its curve is drawn.
    """

    name: str
    make: oftfx.Spec | Callable[[], peft.PeftConfig]
    rates: tuple[float, ...]
    seeds: int = 3
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
        config = self.make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(model, config)
        if isinstance(config, peft.BOFTConfig):
            _check_factors(adapted, config.boft_n_butterfly_factor)
        return adapted


def _check_factors(model: nn.Module, factors: int) -> None:
    """PEFT trains one factor, whatever was asked for, where its CUDA extension does not build."""
    for name, parameter in model.named_parameters():
        if "boft_R" in name and len(parameter) != factors:
            raise RuntimeError(f"PEFT made {len(parameter)} BOFT factors of the {factors} wanted.")


LORA = Arm(
    "PEFT LoRA r8",
    lambda: peft.LoraConfig(r=8, target_modules="all-linear"),
    (1.5e-4, 3e-4, 6e-4, 1.2e-3),
)
OFT = Arm("oftfx OFT b32", oftfx.OFT(block_size=32), (5e-5, 1e-4, 2e-4, 4e-4))

OTHERS = (
    Arm("oftfx COFT b32", oftfx.COFT(block_size=32, eps=0.3), (1e-4, 2e-4, 4e-4)),
    Arm("oftfx BOFT b16 m2", oftfx.BOFT(block_size=16, factors=2), (5e-5, 1e-4, 2e-4)),
    Arm("oftfx HRA r16", oftfx.HRA(rank=16), (5e-4, 1e-3, 2e-3)),
    Arm("oftfx PSOFT r150", oftfx.PSOFT(rank=150), (5e-5, 1e-4, 2e-4)),
    Arm("oftfx LOFT r150", oftfx.LOFT(rank=150), (5e-5, 1e-4, 2e-4)),
    Arm("oftfx GOFT, scaled", oftfx.GOFT(scale=True), (1e-3, 2e-3, 4e-3), panel="variants"),
    Arm("oftfx QGOFT", oftfx.QGOFT(), (5e-4, 1e-3, 2e-3), panel="variants"),
    Arm(
        "oftfx LOFT r106, free core",
        oftfx.LOFT(rank=106, core="free"),
        (5e-5, 1e-4, 2e-4),
        panel="variants",
    ),
    Arm(
        "oftfx LOFT r150, principal",
        oftfx.LOFT(rank=150, support="principal"),
        (5e-5, 1e-4, 2e-4),
        panel="variants",
    ),
    Arm(
        "oftfx LOFT r150, random",
        oftfx.LOFT(rank=150, support="random"),
        (5e-5, 1e-4, 2e-4),
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
PEFT_SLOW = (
    Arm(
        "PEFT HRA r16",
        lambda: peft.HRAConfig(r=16, target_modules="all-linear"),
        (5e-3,),
        seeds=1,
        panel="PEFT",
    ),
    Arm(
        "PEFT BOFT b16 m2",
        lambda: peft.BOFTConfig(
            boft_block_size=16, boft_n_butterfly_factor=2, target_modules="all-linear"
        ),
        (1e-4, 2e-4),
        seeds=1,
        panel="PEFT",
    ),
)
PEFT_PSOFT = Arm(
    "PEFT PSOFT r150",
    lambda: peft.PsoftConfig(
        r=150, psoft_svd="lowrank", use_cayley_neumann=True, target_modules="all-linear"
    ),
    (5e-5, 1e-4, 2e-4),
    panel="PEFT",
)

OVERLAY = Arm(  # PEFT's polynomial, for the two loss curves that must lie on each other
    "oftfx OFT b32 k3", oftfx.OFT(block_size=32, order=3), (1e-4,), seeds=1, panel="none"
)

ARMS = (LORA, OFT, *OTHERS, PEFT_OFT, PEFT_PSOFT, *PEFT_SLOW, OVERLAY)


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: Arm
    rate: float
    seed: int

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells it from the others."""
        return self.arm.name, self.rate, self.seed


def jobs() -> list[Job]:
    """All trainings, those that tell most first: the first seeds of all, then the other seeds."""
    order = (
        (LORA, OFT, OVERLAY, PEFT_OFT, *PEFT_SLOW, *OTHERS, PEFT_PSOFT),
        (LORA, OFT, *OTHERS, PEFT_OFT, PEFT_PSOFT),
    )
    return [
        Job(arm, rate, seed)
        for seed in range(3)
        for arm in order[min(seed, 1)]
        if seed < arm.seeds
        for rate in arm.rates
    ]
