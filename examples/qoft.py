"""QOFT from start to end: load a model in 4 bits, adapt, train, fold to floats, and reload.

    pip install bitsandbytes
    python examples/qoft.py [model directory]

Without an argument it makes a tiny random model; nothing is downloaded.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import oftfx


def tiny_model(directory: str) -> str:
    """Saves a random Llama; the directory it went to."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


with tempfile.TemporaryDirectory() as scratch:
    path = sys.argv[1] if len(sys.argv) > 1 else tiny_model(f"{scratch}/base")

    # 1. Load the base in NF4, as for any other use.
    model = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    print(f"base in 4 bits: {model.get_memory_footprint() / 2**20:.2f} MiB")

    # 2. Rotate the input of every 4-bit layer. Its bytes are never touched.
    oftfx.adapt(model, oftfx.OFT(block_size=32))

    # 3. Train with anything.
    tokens = torch.arange(64).roll(7).repeat(4, 2)  # what it should learn: to count
    optimizer = torch.optim.AdamW(oftfx.parameters(model), lr=1e-2, weight_decay=0.0)
    for step in range(1, 61):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        expected = model(tokens).logits

    # 4. Fold to an ordinary bfloat16 model, which any tool loads.
    _, report = oftfx.merge(model, report=True)
    worst = max(report.sites, key=lambda site: site.output_error)
    print(f"folded; the largest change of a layer's output: {worst.output_error:.1e} ({worst.fqn})")
    merged = Path(scratch, "merged")
    model.save_pretrained(merged)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        difference = (plain(tokens).logits - expected).norm() / expected.norm()
    print(f"reloaded as {type(plain).__name__} in {plain.dtype}: logits differ by {difference:.1e}")
