"""TRL's DPOTrainer whose reference is the model itself with its adapter off: no second model.

    pip install trl
    python examples/trl_dpo.py

A tiny random model and a tokenizer made here; nothing is downloaded.
"""

import tempfile

import torch
from datasets import Dataset
from tiny import language_model, tokenizer
from trl import DPOConfig, DPOTrainer

import oftfx
from oftfx.train import reference, watch

tokens = tokenizer()
base = language_model(len(tokens))
model = oftfx.adapt(language_model(len(tokens)), oftfx.OFT(block_size=16))
rows = {"prompt": "one two three", "chosen": " four five six", "rejected": " six five four"}
preferences = Dataset.from_list([rows] * 32)

with tempfile.TemporaryDirectory() as scratch:
    arguments = DPOConfig(
        scratch,
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(
        model,
        ref_model=reference(model),
        args=arguments,
        train_dataset=preferences,
        processing_class=tokens,
    )
    watch(trainer)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {log[0]['loss']:.3f} → {log[-1]['loss']:.3f}")
    # The adapter starts as the identity: no preference over the reference, a loss of ln 2.
    assert abs(log[0]["loss"] - 0.6931) < 1e-3
    assert log[-1]["loss"] < 0.5

    # After training the reference still is the base, to the last bit.
    ids = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(trainer.ref_model(ids).logits, base.eval()(ids).logits)
