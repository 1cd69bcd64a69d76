"""An adapter as LoRA: exactly the same function where that is possible, measured where not."""

import copy
import json

import pytest
import torch
from peft import PeftModel

import oftfx
from oftfx import CheckpointError, testing
from oftfx.interop.peft.lora import factored
from oftfx.modules import built
from oftfx.rotations import method_of
from tests.quantised import linear4bit, quantised_llama
from tests.small import llama, tokens


def adapted(spec):
    base = llama()
    ours = oftfx.adapt(copy.deepcopy(base), spec).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in oftfx.parameters(ours):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return base, ours


EXACT = [
    oftfx.PSOFT(rank=4),
    oftfx.LOFT(rank=4, support="random"),
    oftfx.LOFT(rank=4, support="principal", core="free"),
    oftfx.HRA(rank=4, init_std=0.1),
    oftfx.LOFT(rank=4, support="random", share_inputs=True),
    oftfx.LOFT(rank=4, support="random", overrides={"q_proj": {"rank": 2}}),
]


@pytest.mark.parametrize("spec", EXACT, ids=lambda spec: type(spec).__name__)
@torch.no_grad()
def test_few_directions_are_lora_exactly(spec, tmp_path):
    base, ours = adapted(spec)
    report = oftfx.save(ours, tmp_path, format="lora")
    assert {site.error for site in report.sites} == {0}
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == {
        site.fqn for site in report.sites
    }
    one, other = ours(**tokens()).logits, theirs(**tokens()).logits
    assert (one - base(**tokens()).logits).norm() > 1e-3 * one.norm()
    assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize(
    "spec",
    [oftfx.OFT(block_size=8), oftfx.BOFT(block_size=8), oftfx.GOFT()],
    ids=lambda spec: type(spec).__name__,
)
def test_all_directions_are_the_nearest_of_a_rank(spec):
    """Against the decomposition that is best by Eckart and Young's theorem."""
    torch.manual_seed(0)
    weight = torch.randn(24, 32, dtype=torch.float64)
    shapes = method_of(spec).shapes(spec, 32)
    tensors = {
        name: 0.1 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()
    }
    factors = method_of(spec).factors(built(spec, tensors), spec)
    folded = weight
    for factor in reversed(factors):
        folded = factor.transposed()(folded)
    change = folded - weight
    singular = torch.linalg.svdvals(change)
    for rank in (1, 4, 20):
        a, b, error = factored(weight, factors, rank)
        assert (a.shape, b.shape) == ((rank, 32), (24, rank))
        best = singular[rank:].norm() / singular.norm()
        assert best * (1 - 1e-9) <= error <= best * 1.02 + 1e-9
    assert factored(weight, factors, 99)[2] < 1e-9


FULL = [
    oftfx.OFT(block_size=8),
    oftfx.COFT(block_size=8, eps=0.5),
    oftfx.BOFT(block_size=8, factors=3, exact=True, magnitude=True),
    oftfx.GOFT(scale=True),
    oftfx.QGOFT(),
    oftfx.OFT(block_size=8, also_train=["lm_head", "norm"]),
]


@pytest.mark.parametrize("spec", FULL, ids=lambda spec: type(spec).__name__)
@torch.no_grad()
def test_at_full_rank_every_method_is_lora_exactly(spec, tmp_path):
    base, ours = adapted(spec)
    report = oftfx.save(ours, tmp_path, format="lora", rank=99)
    assert max(site.error for site in report.sites) < 1e-5
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    one, other = ours(**tokens()).logits, theirs(**tokens()).logits
    assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("rank", [4, 99])
@torch.no_grad()
def test_on_a_4_bit_base_it_is_as_near(rank, tmp_path):
    base = quantised_llama(linear4bit)
    ours = oftfx.adapt(copy.deepcopy(base), oftfx.OFT(block_size=8, init_std=0.05)).eval()
    report = oftfx.save(ours, tmp_path, format="lora", rank=rank)
    start, one = base(**tokens()).logits, ours(**tokens()).logits
    other = PeftModel.from_pretrained(base, tmp_path).eval()(**tokens()).logits
    if rank == 99:
        assert max(site.error for site in report.sites) < 1e-5
        assert (one - other).norm() <= 1e-5 * one.norm()
    else:
        assert all(0 < site.error < 1 for site in report.sites)
        assert (one - other).norm() < (one - start).norm()


def test_the_report_states_what_is_lost(tmp_path):
    base, ours = adapted(oftfx.OFT(block_size=8))
    report = oftfx.save(ours, tmp_path, format="lora", rank=8)
    assert all(0 < site.error < 1 and site.rank == 8 for site in report.sites)
    assert "lost" in str(report)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        start, one, other = (m(**tokens()).logits for m in (base, ours, theirs))
    assert (one - other).norm() < (one - start).norm()


def test_without_a_rank_is_refused(tmp_path):
    _, ours = adapted(oftfx.OFT(block_size=8))
    with pytest.raises(CheckpointError, match="rank="):
        oftfx.save(ours, tmp_path / "out", format="lora")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("format", "rank"), [("peft", 4), ("oftfx", 4), ("lora", 0)])
def test_a_rank_that_means_nothing_is_refused(format, rank, tmp_path):
    _, ours = adapted(oftfx.OFT(block_size=8))
    with pytest.raises(ValueError, match="rank"):
        oftfx.save(ours, tmp_path, format=format, rank=rank)


def test_an_untrained_adapter_changes_nothing(tmp_path):
    base = llama()
    ours = oftfx.adapt(copy.deepcopy(base), oftfx.OFT(block_size=8))
    assert {site.error for site in oftfx.save(ours, tmp_path, format="lora", rank=4).sites} == {0}
    testing.assert_close(
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(**tokens()).logits,
        base(**tokens()).logits,
        "logits",
    )
