"""Exported files run in a process that never saw the model, without oftfx and transformers."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import oftfx
from oftfx.export import program
from oftfx.lower import lower
from tests.small import VOCABULARY, llama, tokens

POSITIONS, NEW = 24, 12

RUN = """
import sys, torch
sys.modules["oftfx"] = sys.modules["transformers"] = None
directory, format, *names = sys.argv[1:]

def load(name):
    if format == "pt2":
        return torch.export.load(f"{directory}/{name}.pt2").module()
    return torch._inductor.aoti_load_package(f"{directory}/{name}.pt2")

def generate(step, ids, count):
    new, before = ids, 0
    for _ in range(count):
        logits = step(new, torch.tensor(before))
        before += new.shape[1]
        new = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
    return ids

given, found = torch.load(f"{directory}/given"), {}
with torch.no_grad():
    for name in names:
        model = load(name)
        if name == "step":
            found[name] = [generate(model, ids, given["new"]) for ids in given["prompts"]]
        else:
            found[name] = [model(*batch) for batch in given["batches"]]
torch.save(found, f"{directory}/found")
"""


def elsewhere(directory, format, *names):
    """What exported files give in another process."""
    given = {"batches": [*batches()], "prompts": prompts(), "new": NEW}
    torch.save(given, directory / "given")
    subprocess.run([sys.executable, "-c", RUN, directory, format, *names], check=True)
    return torch.load(directory / "found")


def batches():
    """Of other sizes than any example, one with padding on the left, one a single token."""
    for batch, length, padded in ((3, 13, 4), (1, 20, 0), (1, 1, 0)):
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, :padded] = 0
        yield tokens(batch, length)["input_ids"], mask


def prompts():
    """One after the other, so that the second meets what the first left in the cache."""
    return [tokens(1, length, seed=length)["input_ids"] for length in (9, 5)]


def agree(found, model):
    for batch, logits in zip(batches(), found, strict=True):
        with torch.no_grad():
            expected = model(batch[0], attention_mask=batch[1], use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)


def greedy(model, ids):
    return model.generate(
        ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )


@pytest.mark.parametrize("format", ["pt2", pytest.param("aoti", marks=pytest.mark.slow)])
def test_they_run_elsewhere(format, tmp_path):
    """With any batch and length; and a step with a static cache speaks as `generate` does."""
    model = oftfx.adapt(llama(layers=1), oftfx.OFT(block_size=16, init_std=0.05))
    oftfx.export(model, tmp_path / "adapted.pt2", format=format)
    oftfx.export(model, tmp_path / "step.pt2", format=format, cache=POSITIONS)
    spoken = [greedy(model, ids) for ids in prompts()]
    oftfx.merge(model)
    oftfx.export(model, tmp_path / "merged.pt2", format=format)
    found = elsewhere(tmp_path, format, "adapted", "step", "merged")
    agree(found["adapted"], model)
    agree(found["merged"], model)
    assert all(map(torch.equal, found["step"], spoken))


SPECS = {
    "oft": oftfx.OFT(block_size=16, init_std=0.05),
    "guarded": oftfx.OFT(block_size=16, init_std=0.05, guard="exact", magnitude=True),
    "boft": oftfx.BOFT(block_size=8, init_std=0.05),
    "goft": oftfx.GOFT(init_std=0.05, targets="q_proj"),
    "hra": oftfx.HRA(rank=4),
    "psoft": oftfx.PSOFT(rank=4, init_std=0.05),
    "shared": oftfx.OFT(block_size=16, init_std=0.05, share_inputs=True, share_blocks=True),
}


@pytest.mark.parametrize(
    "name",
    ["guarded", *(pytest.param(n, marks=pytest.mark.slow) for n in SPECS if n != "guarded")],
)
def test_a_lowered_program_has_no_op_of_oftfx(name):
    model = llama(layers=1)
    oftfx.adapt(model, SPECS[name])
    with torch.no_grad():
        for parameter in oftfx.parameters(model):
            parameter.add_(0.02 * torch.randn_like(parameter))
    lowered = program(model)
    targets = {str(node.target) for node in lowered.graph.nodes}
    assert not any(target.startswith("oftfx") for target in targets)
    agree([lowered.module()(*batch) for batch in batches()], model)


def test_a_program_without_rotations_is_as_it_was():
    found = torch.export.export(nn.Linear(4, 4), (torch.ones(2, 4),))
    assert lower(found) is found


def windowed():
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        initializer_range=0.3,
    )
    return MistralForCausalLM(config).eval()


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=64, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("make", [windowed, gpt2])
def test_a_step_of_other_models(make):
    """Of one whose attention has a window, too, beyond which generation goes."""
    model = make()
    step = program(model, cache=POSITIONS).module()
    for ids in prompts():
        spoken, new, before = greedy(model, ids), ids, 0
        while before < spoken.shape[1] - 1:
            logits = step(new, torch.tensor(before))
            before += new.shape[1]
            new = logits.argmax(-1, keepdim=True)
            assert torch.equal(new[0], spoken[0, before : before + 1])


def test_what_cannot_be_exported_leaves_nothing(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(8, 4)

        def forward(self, input_ids, attention_mask, use_cache):
            return self.embedding(input_ids).view(2, -1, 4)

    with pytest.raises(oftfx.CaptureError, match="Fixed cannot be exported"):
        oftfx.export(Fixed(), tmp_path / "model.pt2")
    with pytest.raises(oftfx.CaptureError, match=r"Fixed cannot be .* with a static cache"):
        oftfx.export(Fixed(), tmp_path / "model.pt2", cache=8)
    assert not [*tmp_path.iterdir()]


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="format='onnx'"):
        oftfx.export(llama(), tmp_path / "model.pt2", format="onnx")
    with pytest.raises(ValueError, match=r"ends in \.pt2"):
        oftfx.export(llama(), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="cache=1"):
        oftfx.export(llama(), tmp_path / "model.pt2", cache=1)
    with pytest.raises(oftfx.CaptureError, match="on meta"):
        oftfx.export(llama().to("meta"), tmp_path / "model.pt2", format="aoti")
