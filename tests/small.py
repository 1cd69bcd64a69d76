"""Small models that the tests share, each with one feature that adapting has to get right."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

VOCABULARY = 96


def llama(
    dtype: torch.dtype = torch.float32, tied: bool = True, layers: int = 2, intermediate: int = 96
):
    """Always the same one. Not of one scale, so that no two layers compute the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tokens(batch: int = 2, length: int = 10, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    return {"input_ids": ids, "use_cache": False}


class Attention(nn.Module):
    """Three layers read one tensor; a residual goes around them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:])
        scores = self.q(h) @ self.k(h).mT
        return x + self.out(torch.softmax(scores, -1) @ self.v(h))


class Functional(nn.Module):
    """Weights used without a layer: as x·Wᵀ, as x·W, and one that is called `weight`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2 * width, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(2 * width, width) / width**0.5)
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.up))
        return F.linear(torch.tanh(h @ self.down), self.weight)


class Conv(nn.Module):
    """transformers' Conv1D, whose weight is stored (in, out)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = Conv1D(2 * width, width)
        self.down = Conv1D(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(20 * self.up(x)))


class TwiceUsed(nn.Module):
    """One layer called twice, on different tensors."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


class Tied(nn.Module):
    """Two layers over one weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Residual(nn.Linear):
    """A Linear whose own forward does more than multiply."""

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


SMALL = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)),
    "attention": Attention,
    "functional": Functional,
    "conv1d": Conv,
    "twice used": TwiceUsed,
    "tied": Tied,
    "subclass": lambda: nn.Sequential(Residual(8, 8), nn.Linear(8, 8)),
}


def small(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return SMALL[name]().to(dtype).eval()


def rows(dtype: torch.dtype = torch.float64, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, width, generator=generator, dtype=torch.float64).to(dtype)
