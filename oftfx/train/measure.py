"""Losses with their standard errors, and text samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from oftfx.train.data import IGNORED, collate
from oftfx.train.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Losses(NamedTuple):
    """Next-token losses of blocks of text, which may ask for different numbers of tokens.

    Attributes:
        sums: (blocks,) nats over the tokens that a block asks for; float64 on the CPU.
        counts: (blocks,) how many tokens those are.
    """

    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> float:
        """Nats per token: every token counts the same, whichever block it is in."""
        return (self.sums.sum() / self.counts.sum()).item()


@dataclass(frozen=True)
class Estimate:
    """A mean over the tokens of a text, with the standard error of that mean."""

    mean: float
    stderr: float

    @classmethod
    def of(cls, losses: Losses) -> "Estimate":
        """Estimates nats per token from blocks, each drawn with the tokens that it asks for.

        The error is that of a ratio of two sums over blocks; for equal counts, that of a mean.
        """
        blocks = len(losses.sums)
        if blocks == 1:
            return cls(losses.mean, math.nan)
        residuals = losses.sums - losses.mean * losses.counts
        spread = (residuals.square().sum() * blocks / (blocks - 1)).sqrt()
        return cls(losses.mean, (spread / losses.counts.sum()).item())

    def __str__(self) -> str:
        return f"{self}"

    def __format__(self, sign: str) -> str:
        return f"{self.mean:{sign}.3f} ± {self.stderr:.3f}"


@dataclass(frozen=True)
class Change:
    """A loss in nats per token before and after, on the same blocks.

    Attributes:
        before: The base model's loss.
        after: The adapted model's loss.
        change: ``after - before``. Its error is that of the paired differences, far smaller
            than either loss's own: blocks are hard or easy for both.
    """

    before: Estimate
    after: Estimate
    change: Estimate

    @classmethod
    def between(cls, before: Losses, after: Losses) -> "Change":
        """Compares the losses of the same blocks, block by block."""
        paired = Losses(after.sums - before.sums, after.counts)
        return cls(Estimate.of(before), Estimate.of(after), Estimate.of(paired))


@torch.no_grad()
def losses(
    model: "PreTrainedModel",
    blocks: "Dataset",
    batch_size: int,
    tick: Callable[[int], None] = lambda rows: None,
) -> Losses:
    """The next-token losses of every block over what is to be learned, in evaluation mode.

    Args:
        model: A causal language model; left in the mode it was in.
        blocks: Packed tokens.
        batch_size: Blocks in a forward pass.
        tick: Called after each pass with the number of blocks it took.
    """
    training = model.training
    model.eval()
    sums, counts = [], []
    for start in range(0, len(blocks), batch_size):
        rows = [blocks[i] for i in range(start, min(start + batch_size, len(blocks)))]
        batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        each = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=IGNORED)
        sums.append(each.sum(1).cpu().double())
        counts.append((labels != IGNORED).sum(1).cpu())
        tick(len(rows))
    model.train(training)
    return Losses(torch.cat(sums), torch.cat(counts))


@torch.no_grad()
def logits(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    """The logits of one batch in evaluation mode, float32 on the CPU: ``(batch, seq, vocab)``."""
    model.eval()
    return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


SAMPLED = 64
"""Tokens that a sample continues its prompt by, at most."""


def sample(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    seed: int,
) -> str:
    """Continues a prompt by nucleus sampling; the same seed draws the same numbers.

    Returns:
        The continuation without the prompt.

    Raises:
        DataError: The tokenizer makes no tokens of the prompt.
    """
    model.eval()
    batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    if not batch["input_ids"].numel():
        raise DataError(f"the tokenizer makes no tokens of the prompt {prompt!r}: give another.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=SAMPLED,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            repetition_penalty=1.1,  # small models otherwise circle around one phrase
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
