"""A tiny language model, its tokenizer and some text, made here and gone with the test run."""

import contextlib
import io
import sys
import types
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import oftfx
from oftfx.train import publish, reload

END = "<|end|>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte but the soft hyphen's, two for pairs, and one for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([END, *alphabet[:-1], "th", "an"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("a", "n")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_model() -> LlamaForCausalLM:
    """Two Llama layers of width 64, always the same ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture
def reload_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged model is checked in this process: another one takes seconds to import torch."""

    def run(command: list[str], **options: object) -> types.SimpleNamespace:
        printed = io.StringIO()
        with monkeypatch.context() as within, contextlib.redirect_stdout(printed):
            within.setitem(sys.modules, "oftfx", oftfx)  # which main takes away
            reload.main(*command[3:])
        return types.SimpleNamespace(returncode=0, stdout=printed.getvalue())

    # In that module alone: the CPU kernels may be built meanwhile, by a process too.
    monkeypatch.setattr(publish, "subprocess", types.SimpleNamespace(run=run))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "task.txt"
    path.write_text(
        "".join(f"{n} little boats set out to sea, and one came home.\n" for n in range(60))
    )
    return path


@pytest.fixture(scope="session")
def other_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text("Quartz veins cross the older shale; assay them twice. " * 30)
    return path
