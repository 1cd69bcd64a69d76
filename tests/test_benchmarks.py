"""What `benchmarks/` claims is read off its measurements by rules that hold."""

import importlib
import json
import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import oftfx
from tests.small import llama, tokens

pytest.importorskip("peft")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("arms")


@pytest.fixture
def rates(arms: ModuleType) -> ModuleType:
    return importlib.import_module("rates")


@pytest.fixture
def curves(arms: ModuleType) -> ModuleType:
    return importlib.import_module("curves")


def training(arm: str, rate: float, gain: float, forgetting: float, seed: int = 0) -> Any:
    return {
        "kind": "training",
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "gain": gain,
        "forgetting": forgetting,
        "parameters": 1000,
        "losses": [3.0 - 0.01 * step for step in range(4)],
    }


def test_forgetting_at_a_gain_lies_between_its_neighbours(curves: ModuleType) -> None:
    rows = [training("a", 1e-4, 0.5, 0.1), training("a", 4e-4, 0.6, 0.4)]
    place = curves.at(curves.points(rows, "a"), 0.55)
    assert math.isclose(place.forgetting, 0.2)
    assert math.isclose(place.rate, 2e-4)


def test_a_gain_that_no_rate_reaches_has_no_forgetting(curves: ModuleType) -> None:
    rows = [training("a", 1e-4, 0.5, 0.1), training("a", 2e-4, 0.6, 0.4)]
    curve = curves.points(rows, "a")
    assert curves.at(curve, 0.45) is None
    assert curves.at(curve, 0.65) is None


def test_only_the_rising_part_of_a_curve_counts(curves: ModuleType) -> None:
    gains = (0.4, 0.6, 0.3, 0.7)
    rows = [training("a", 10.0**i, gain, 0.1 * (i + 1)) for i, gain in enumerate(gains)]
    assert curves.at(curves.points(rows, "a"), 0.65) is None


def test_a_point_is_the_mean_over_the_seeds(curves: ModuleType) -> None:
    rows = [training("a", 1e-4, 0.5 + 0.1 * s, 0.1, seed=s) for s in range(3)]
    (point,) = curves.points(rows, "a")
    assert math.isclose(point.gain, 0.6)
    (point,) = curves.points(rows, "a", seed=2)
    assert math.isclose(point.gain, 0.7)


def test_rates_are_added_until_a_curve_is_covered(arms: ModuleType) -> None:
    def wanted(gains: dict[float, float]) -> set[float]:
        done = {(arms.OFT.name, rate, 0): gain for rate, gain in gains.items()}
        found = {j.rate for j in arms.jobs(done) if j.arm is arms.OFT and j.seed == 0}
        return found - set(gains)

    rates = arms.OFT.rates
    rising = dict(zip(rates, (0.5, 0.55, 0.6, 0.65), strict=True))
    assert wanted(rising) == set()
    low = dict(zip(rates, (0.3, 0.4, 0.5, 0.55), strict=True))
    assert wanted(low) == {rates[-1] * 2}
    high = dict(zip(rates, (0.65, 0.6, 0.5, 0.3), strict=True))
    assert wanted(high) == {rates[0] / 2}
    broken = dict(zip(rates, (math.nan,) * len(rates), strict=True))
    assert wanted(broken) == {rates[0] / 2}


def test_other_seeds_run_where_the_first_one_told_something(arms: ModuleType) -> None:
    gains = dict(zip(arms.OFT.rates, (0.4, 0.5, 0.6, 0.66), strict=True))
    done = {(arms.OFT.name, rate, 0): gain for rate, gain in gains.items()}
    seconds = {j.rate for j in arms.jobs(done) if j.arm is arms.OFT and j.seed == 1}
    assert seconds == set(arms.OFT.rates[1:])


def test_peft_trains_all_factors_of_boft_that_ours_has(arms: ModuleType) -> None:
    ours = next(arm.make for arm in arms.ARMS if arm.name == "oftfx BOFT b16 m2")
    base = llama(layers=1)
    wanted = oftfx.plan(base, ours, tokens()).num_trainable
    theirs = arms.PEFT_BOFT.adapt(base, 0, [])
    theirs(**tokens()).logits.square().sum().backward()
    blocks = [p for name, p in theirs.named_parameters() if "boft_R" in name]
    assert sum(p.numel() * 15 // 32 for p in blocks) == wanted
    assert all(factor.any() for p in blocks for factor in p.grad)


def test_blocks_lie_on_a_diagonal(arms: ModuleType) -> None:
    blocks = torch.randn(2, 3, 4, 4)
    dense = torch.stack([torch.block_diag(*factor) for factor in blocks])
    assert torch.equal(arms.block_diagonal(blocks), dense)


def test_reflections_at_once_are_pefts_one_by_one(arms: ModuleType) -> None:
    theirs = arms.PEFT_HRA.adapt(llama(layers=1), 0, [])
    layer = next(m for m in theirs.modules() if isinstance(m, arms.hra_layer.HRALinear))
    (u,) = layer.hra_u.values()
    torch.nn.init.normal_(u)
    for reverse in (False, True):
        one_by_one = layer.get_delta_weight("default", reverse)
        with arms.reflections_at_once():
            torch.testing.assert_close(layer.get_delta_weight("default", reverse), one_by_one)


def test_the_report_has_pictures_and_every_method(
    arms: ModuleType, curves: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"kind": "setting", "steps": 4}]
    rows.append({"kind": "error", "of": "cost", "arm": arms.OFT.name, "error": "ValueError: no"})
    rows.append({"kind": "taken", "arm": arms.OFT.name, "rate": 1e-4, "seed": 0})
    for arm in (arms.LORA, arms.OFT, arms.OVERLAY, arms.PEFT_OFT):
        rows.append(
            {"kind": "cost", "arm": arm.name, "step_seconds": 0.1, "peak_gib": 3.0}
            | {"parameters": 1000}
        )
        gains = (0.5, 0.6, 0.65, 0.7)
        rows += [training(arm.name, r, g, g**4) for r, g in zip(arm.rates, gains, strict=False)]
    curves.report(rows, tmp_path)
    printed = capsys.readouterr().out
    assert "| oftfx OFT b32 | 0.00M | 100 | 3.0 | 0.700 |" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"methods.png", "oft-beside-peft.png"}


@pytest.fixture
def bar(arms: ModuleType) -> ModuleType:
    return importlib.import_module("bar")


def test_what_was_measured_holds_every_promise_of_speed(bar: ModuleType) -> None:
    found = bar.shown(bar.RESULTS)
    lines = found.splitlines()[2:]
    assert len(lines) == len(bar.PROMISES)
    assert all(line.endswith("  yes") for line in lines)
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    assert f"```text\n{found}\n```" in page


def test_a_promise_that_was_not_held_is_said_so(bar: ModuleType, tmp_path: Path) -> None:
    seconds = {bar.BASE: [1.0, 1.0, 9.0], bar.OWN: [1.2, 1.1, 1.1], bar.PEFT_OFT: [1.3]}
    (tmp_path / "cpu.json").write_text(json.dumps({"seconds": seconds}))
    lines = bar.shown(tmp_path).splitlines()[2:]
    of_cpu = [promise.file for promise in bar.PROMISES].index("cpu")
    assert lines.pop(of_cpu).split()[-3:] == ["1.100", "1.03", "no"]
    assert lines.pop(of_cpu).split()[-3:] == ["0.846", "1", "yes"]
    assert all(line.endswith("not measured") for line in lines)


def test_a_measurement_that_fails_is_named(
    bar: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bar.ON_CPU, "cpu", ("step.py", "--rows", "no such row"))
    monkeypatch.setattr("sys.argv", ["bar.py", "--only", "cpu", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="failed: cpu"):
        bar.main()


def fixed_text(pattern: str) -> torch.Tensor:
    """English for the base and sums for the adapters, which stay what they are.

    The project's own text, which the benchmark reads, grows, and every loss with it changes.
    """
    if pattern.endswith(".md"):
        return torch.tensor(list((BENCHMARKS.parent / "LICENSE").read_bytes()))
    draw = random.Random(0).randrange
    pairs = ((draw(100), draw(100)) for _ in range(3000))
    return torch.tensor(list("".join(f"    {a} + {b} == {a + b}\n" for a, b in pairs).encode()))


@pytest.mark.slow
def test_in_units_of_an_angle_one_rate_suits_every_block_size(
    rates: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a language model; in entries of Q the rate that suits narrow blocks spoils wide ones."""
    monkeypatch.setattr(rates, "text", fixed_text)
    setting = rates.Setting(hidden=64, layers=1, tokens=32, batch=8, before=200, steps=30)
    narrow, wide = rates.losses(setting, unit_rate=True, blocks=(8, 64))
    together = int((narrow + wide).argmin())
    lost = max(narrow[together] - narrow.min(), wide[together] - wide.min())
    narrow, wide = rates.losses(setting, unit_rate=False, blocks=(8, 64))
    assert narrow.argmin() - wide.argmin() >= 2
    spoiled = wide[narrow.argmin()] - wide.min()
    assert spoiled > 0.2
    assert lost < spoiled / 10
