"""Exported files run in a process that never saw the model."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import oftfx
from tests.small import llama, tokens

RUN = """
import sys, torch
directory, format, adapted = sys.argv[1:]
if adapted == "adapted":
    import oftfx
else:
    sys.modules["oftfx"] = None
sys.modules["transformers"] = None
if format == "pt2":
    model = torch.export.load(f"{directory}/model.pt2").module()
else:
    model = torch._inductor.aoti_load_package(f"{directory}/model.pt2")
batches = torch.load(f"{directory}/batches")
with torch.no_grad():
    torch.save([model(*batch) for batch in batches], f"{directory}/logits")
"""


def batches():
    """Of other sizes than any example, one with padding on the left, one a single token."""
    for batch, length, padded in ((3, 13, 4), (1, 20, 0), (1, 1, 0)):
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, :padded] = 0
        yield tokens(batch, length)["input_ids"], mask


@pytest.mark.parametrize("adapted", ["merged", "adapted"])
@pytest.mark.parametrize("format", ["pt2", pytest.param("aoti", marks=pytest.mark.slow)])
def test_it_runs_elsewhere_with_any_batch_and_length(format, adapted, tmp_path):
    model = oftfx.adapt(llama(layers=1), oftfx.OFT(block_size=16, init_std=0.05))
    if adapted == "merged":
        oftfx.merge(model)
    torch.save([*batches()], tmp_path / "batches")
    oftfx.export(model, tmp_path / "model.pt2", format=format)
    subprocess.run([sys.executable, "-c", RUN, tmp_path, format, adapted], check=True)
    for batch, logits in zip(batches(), torch.load(tmp_path / "logits"), strict=True):
        with torch.no_grad():
            expected = model(batch[0], attention_mask=batch[1], use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)


def test_what_cannot_be_exported_leaves_nothing(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(8, 4)

        def forward(self, input_ids, attention_mask, use_cache):
            return self.embedding(input_ids).view(2, -1, 4)

    with pytest.raises(oftfx.CaptureError, match="Fixed cannot be exported"):
        oftfx.export(Fixed(), tmp_path / "model.pt2")
    assert not [*tmp_path.iterdir()]


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="format='onnx'"):
        oftfx.export(llama(), tmp_path / "model.pt2", format="onnx")
    with pytest.raises(ValueError, match=r"ends in \.pt2"):
        oftfx.export(llama(), tmp_path / "model.onnx")
    with pytest.raises(oftfx.CaptureError, match="on meta"):
        oftfx.export(llama().to("meta"), tmp_path / "model.pt2", format="aoti")
