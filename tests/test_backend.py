"""`torch.compile(model, backend="oftfx")`."""

import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from uuid import uuid4

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import oftfx
from oftfx import OFT, OftfxWarning, testing
from oftfx.backend import oftfx as backend
from tests.small import Attention, rows

SPEC = OFT(block_size=4, init_std=0.2)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_the_backend_counts_rotations_and_cores():
    x = rows(torch.float32)
    model = oftfx.adapt(Attention(), OFT(block_size=4, share_inputs=True), example_inputs=x)
    with torch.no_grad():
        torch.compile(model, backend=backend, options={"max_autotune": False})(x)
    assert counters["oftfx"]["graphs"] == 1
    assert counters["oftfx"]["rotations"] >= 2
    assert counters["oftfx"]["cores"] >= 2


def test_the_backend_warns_of_a_model_without_rotations():
    with pytest.warns(OftfxWarning, match="adapt"), torch.no_grad():
        torch.compile(Attention(), backend=backend)(rows(torch.float32))


def test_the_backend_does_not_warn_of_an_adapted_model():
    model = oftfx.adapt(Attention(), OFT(block_size=4), example_inputs=rows(torch.float32))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", OftfxWarning)
        torch.compile(model, backend=backend)(rows(torch.float32))


def _installed() -> bool:
    found = importlib.metadata.entry_points(group="torch_dynamo_backends")
    return any(entry.name == "oftfx" for entry in found)


@pytest.mark.skipif(not _installed(), reason="oftfx is not pip-installed here")
def test_the_backend_is_found_by_its_name():
    assert "oftfx" in torch._dynamo.list_backends()
    model = oftfx.adapt(Attention(), OFT(block_size=4), example_inputs=rows(torch.float32))
    with torch.no_grad():
        torch.compile(model, backend="oftfx")(rows(torch.float32))
    assert counters["oftfx"]["rotations"] == 4


def test_the_backend_hands_its_options_and_mode_to_inductor():
    x = rows(torch.float32)
    model = oftfx.adapt(nn.Sequential(nn.Linear(8, 8)), SPEC, example_inputs=x)
    for options in ({"options": {"max_autotune": False}}, {"mode": "default"}):
        torch._dynamo.reset()
        testing.assert_same_function(torch.compile(model, backend=backend, **options), model, x)
    with pytest.raises(Exception, match="no_such_option"), torch.no_grad():
        torch.compile(model, backend=backend, options={"no_such_option": 1})(
            rows(width=8)[:1].float()
        )


def test_the_backend_counts_rotations_in_the_bodies_of_checkpointed_regions():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(8, 8)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, torch.tanh(x), use_reentrant=False)

    x = rows(torch.float32)
    model = oftfx.adapt(Checkpointed(), SPEC, example_inputs=x)
    testing.assert_same_function(torch.compile(model, backend=backend), model, x)
    assert counters["oftfx"]["rotations"] >= 1


PROCESS = """
import json, torch, oftfx
from torch import nn
from torch._dynamo.utils import counters

x = torch.ones(3, 8)
model = oftfx.adapt(nn.Sequential(nn.Linear(8, 8)), oftfx.OFT(block_size=4), example_inputs=x)
oftfx.compile(model)(x).sum().backward()
print(json.dumps({name: counters[name] for name in ("aot_autograd", "inductor", "oftfx")}))
"""


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", PROCESS],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        for _ in range(2)
    ]
    first, second = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    assert first["aot_autograd"]["autograd_cache_saved"] == 1
    assert second["aot_autograd"]["autograd_cache_hit"] == 1
    assert second["inductor"]["fxgraph_cache_hit"] == 2  # forward and backward
    assert "fxgraph_cache_miss" not in second["inductor"]
    assert not any("bypass" in name for counts in second.values() for name in counts)
    assert second["oftfx"] == first["oftfx"]  # the passes run before the caches are asked


def test_the_caches_forget_what_another_version_of_the_ops_compiled(monkeypatch):
    x = rows(torch.float32)

    model = oftfx.adapt(nn.Sequential(nn.Linear(8, 8)), SPEC, example_inputs=x)
    with torch.no_grad():
        oftfx.compile(model)(x)
        torch._dynamo.reset()
        counters.clear()
        oftfx.compile(model)(x)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
        torch._dynamo.reset()
        counters.clear()
        monkeypatch.setattr("oftfx.backend._source", lambda: uuid4().hex)  # no earlier run's
        oftfx.compile(model)(x)
        assert counters["aot_autograd"]["autograd_cache_miss"] == 1
