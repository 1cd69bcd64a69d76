"""The whole of oftfx in one plain training loop, on a tiny random model: adapt, train, fold.

    python examples/finetune_and_merge.py

Nothing here is special to transformers: any nn.Module and any training loop will do.
"""

import copy

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import oftfx

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    initializer_range=0.2,
)
model = LlamaForCausalLM(config)
base = copy.deepcopy(model)
tokens = torch.arange(64).roll(7).repeat(4, 2)  # what it should learn: to count

# 1. Look first: what would be adapted, and what is skipped and why?
spec = oftfx.OFT(block_size=32)
print(oftfx.plan(model, spec))

# 2. Put a rotation before every linear layer; everything else is frozen.
oftfx.adapt(model, spec)
assert torch.equal(model(tokens).logits, base(tokens).logits)  # it starts at the identity

# 3. Train with anything.
optimizer = torch.optim.AdamW(oftfx.parameters(model), lr=5e-3, weight_decay=0.0)
for step in range(1, 61):
    logits = model(tokens).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        health = oftfx.health(model)
        print(f"step {step}: loss {loss.item():.3f}, largest ‖Q‖ {health.norm.max().item():.3f}")

# 4. Keep the rotations: a few numbers beside the base model.
oftfx.save(model, "out/example-adapter")
again = oftfx.load(base, "out/example-adapter")
assert torch.equal(again(tokens).logits, model(tokens).logits)

# 5. Fold them into the weights: a plain model again, at the price of one rounding.
adapted = model(tokens).logits
merged, report = oftfx.merge(model, report=True)
print(report)
print(f"largest difference in the logits: {(merged(tokens).logits - adapted).abs().max():.1e}")
