"""Losses per token, and how sure they are."""

import math

import pytest
import torch
from datasets import Dataset

from oftfx.train import data, measure
from oftfx.train.errors import DataError
from oftfx.train.measure import Change, Estimate, Losses


def losses(sums, counts):
    return Losses(torch.tensor(sums).double(), torch.tensor(counts))


def test_every_token_counts_the_same_whichever_block_it_is_in(model):
    ids = torch.randint(258, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :12] = data.IGNORED
    rows = {"input_ids": ids.tolist(), "labels": labels.tolist()}
    found = measure.losses(model, Dataset.from_dict(rows).with_format("torch"), batch_size=2)
    assert found.counts.tolist() == [4, 15, 15]
    expected = model(input_ids=ids, labels=labels).loss.item()
    assert found.mean == pytest.approx(expected, rel=1e-5)
    assert Estimate.of(found).mean == found.mean


def test_the_error_of_equal_blocks_is_that_of_their_mean():
    values = torch.randn(10, generator=torch.Generator().manual_seed(0)).double()
    found = Estimate.of(Losses(7 * values, torch.full((10,), 7)))
    assert found.mean == pytest.approx(values.mean().item())
    assert found.stderr == pytest.approx(values.std().item() / math.sqrt(10))


def test_the_error_is_how_far_the_ratio_is_off():
    """Drawn many times over, blocks of few and of many tokens, the harder the fewer."""
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(2000):
        counts = torch.randint(1, 100, (40,), generator=generator)
        noise = torch.randn(40, generator=generator).double()
        draws.append(Estimate.of(Losses(counts * (3 - counts / 100 + 0.3 * noise), counts)))
    means = torch.tensor([each.mean for each in draws])
    stderrs = torch.tensor([each.stderr for each in draws])
    assert stderrs.mean().item() == pytest.approx(means.std().item(), rel=0.05)


def test_one_block_has_no_error():
    found = Estimate.of(losses([6.0], [3]))
    assert found.mean == 2
    assert math.isnan(found.stderr)


def test_a_change_is_of_pairs():
    before, after = losses([10.0, 90.0], [10, 30]), losses([5.0, 75.0], [10, 30])
    change = Change.between(before, after)
    assert (change.before.mean, change.after.mean, change.change.mean) == (2.5, 2.0, -0.5)
    assert change.change.stderr == pytest.approx(0, abs=1e-12)  # half a nat from every token
    assert change.before.stderr > 0


def test_a_prompt_without_tokens_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="makes no tokens of the prompt"):
        measure.sample(model, tokenizer, "", seed=0)
