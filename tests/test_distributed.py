"""An adapted model trains in several processes as it does in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import oftfx
from oftfx import testing
from tests import distributed

SCRIPT = Path(distributed.__file__)
RANKS = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Where both processes left what they ended with."""
    directory = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen([sys.executable, SCRIPT, directory], env=os.environ | {"RANK": str(rank)})
        for rank in range(RANKS)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * RANKS
    return directory


@pytest.mark.parametrize("method", distributed.SPECS)
@pytest.mark.parametrize("way", distributed.WAYS)
def test_ranks_stay_equal_and_learn_what_one_process_learns(found, way, method):
    alone = distributed.model(method)
    losses = distributed.train(alone, 0, 1)
    ranks = [torch.load(found / f"rank{rank}")[way, method] for rank in range(RANKS)]
    mean = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses))

    loaded = [
        oftfx.load(distributed.base(), found / f"{way}-{method}-{rank}") for rank in range(RANKS)
    ]
    saved = [testing.thetas(model).values() for model in loaded]
    for one, other, expected in zip(*saved, testing.thetas(alone).values(), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
    x = distributed.rows(9, 0, 1)
    with torch.no_grad():  # in evaluation, where a core is kept from call to call
        expected = alone.eval()(x)
        merged = oftfx.merge(loaded[0])(x)
    for found_out in (*(rank["out"] for rank in ranks), merged):
        torch.testing.assert_close(found_out, expected, rtol=1e-4, atol=1e-5)
    for rank in ranks:
        torch.testing.assert_close(rank["norm"], oftfx.health(alone).norm, rtol=1e-4, atol=1e-5)
