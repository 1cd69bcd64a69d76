"""The documented road: a quantised transformers model, adapted, trained by Trainer, and folded."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import oftfx
from oftfx import OFT, testing
from tests.quantised import assert_unchanged, float_llama, stored
from tests.small import tokens

CONFIGS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    float_llama(torch.bfloat16).save_pretrained(path)
    return path


def load(path, kind: str):
    config = BitsAndBytesConfig(**CONFIGS[kind])
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


@pytest.mark.parametrize("kind", CONFIGS)
def test_trained_by_trainer_and_folded_to_an_ordinary_model(kind, checkpoint, tmp_path):
    model = load(checkpoint, kind)
    before = stored(model)
    oftfx.adapt(model, OFT(block_size=8))
    start = [parameter.detach().clone() for parameter in oftfx.parameters(model)]
    batch = [{"input_ids": ids, "labels": ids} for ids in tokens(8)["input_ids"]]
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=2,
        learning_rate=0.01,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    Trainer(model, arguments, train_dataset=batch).train()
    moved = oftfx.parameters(model)
    assert all(not torch.equal(a, b) for a, b in zip(start, moved, strict=True))
    assert_unchanged(model, before)

    model.eval()
    adapted = copy.deepcopy(model)
    assert oftfx.merge(model) is model
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype is torch.bfloat16
    assert torch.equal(plain(**tokens()).logits, model(**tokens()).logits)
    # int8 in evaluation also rounds the activations
    within = 0.05 if kind == "int8" else 2 * testing.tolerance(torch.bfloat16)
    testing.assert_close(plain(**tokens()).logits, adapted(**tokens()).logits, "logits", within)


def test_requantised_it_stays_a_quantised_model(checkpoint, tmp_path):
    model = oftfx.adapt(load(checkpoint, "nf4"), OFT(block_size=8, init_std=0.1))
    oftfx.merge(model, requantize=True)
    assert model.config.quantization_config.load_in_4bit
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**tokens()).logits, model(**tokens()).logits)


def test_after_remove_trainer_refuses_the_bare_base_again(checkpoint, tmp_path):
    model = oftfx.remove(oftfx.adapt(load(checkpoint, "nf4"), OFT(block_size=8)))
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, TrainingArguments(output_dir=tmp_path, report_to="none"))


def test_an_adapted_model_can_be_copied_and_pickled(checkpoint):
    model = oftfx.adapt(load(checkpoint, "nf4"), OFT(block_size=8, init_std=0.1))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**tokens()).logits, model(**tokens()).logits)
        assert twin.hf_quantizer.is_trainable
