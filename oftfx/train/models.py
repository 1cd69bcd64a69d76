"""The one place that loads a language model: from a directory, the Hub, or a GGUF file."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from oftfx.sites.pretrained import nf4, quantise
from oftfx.train.errors import ModelError
from oftfx.train.sources import is_hub_id

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTS = ("none", "nf4")


class LanguageModel(NamedTuple):
    """A causal language model and its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


def load(source: str, dtype: str = "auto", quant: str = "none") -> LanguageModel:
    """Loads a causal language model with its tokenizer, in evaluation mode.

    A GGUF file becomes an ordinary float model: it trains, saves and converts like any other. A
    directory of quantised weights gives a quantised model.

    Args:
        source: A model directory, a Hub id (``org/name``) or a ``.gguf`` file.
        dtype: One of ``DTYPES``; ``"auto"`` keeps the dtype the weights are stored in.
        quant: One of ``QUANTS``; ``"nf4"`` quantises the linear layers but the output head with
            bitsandbytes, which then multiply in ``dtype``.

    Raises:
        ModelError: Nothing of that name is a model, transformers cannot load it, or it is quantised
            already.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if quant not in QUANTS:
        raise ModelError(f"quant {quant!r} is not one of {', '.join(QUANTS)}.")
    name, options = _locate(source)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _explained(source):
        # The tokenizer is the cheaper one to fail on.
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if options:
            model = _load_gguf(name, options["gguf_file"], dtype)
            model = quantise(model) if quant == "nf4" else model
        else:
            how = {"quantization_config": _nf4(name, dtype)} if quant == "nf4" else {}
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **how)
    return LanguageModel(model.eval(), tokenizer)


def load_skeleton(source: str) -> "PreTrainedModel":
    """The model on the ``meta`` device: its modules and shapes, no weights, no memory.

    Raises:
        ModelError: As for [`load`][oftfx.train.models.load].
    """
    name, options = _locate(source)

    from transformers import AutoConfig, AutoModelForCausalLM

    with _explained(source):
        config = AutoConfig.from_pretrained(name, **options)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def _nf4(name: str, dtype: str) -> "BitsAndBytesConfig":
    """How to quantise a model that is stored as floats."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("it is quantised already; load it as it is.")
    stored = config.dtype or torch.float32
    return nf4(stored if dtype == "auto" else getattr(torch, dtype))


def _load_gguf(directory: str, file: str, dtype: str) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM, GgufConfig

    # The bar that transformers draws here ignores its own switch for bars.
    with redirect_stderr(io.StringIO()):
        return AutoModelForCausalLM.from_pretrained(
            directory,
            gguf_file=file,
            dtype=dtype,
            # Said out loud, because transformers otherwise keeps the weights packed where it has
            # kernels for them; and where it has not, unpacks them but leaves the model labelled
            # as quantized: Trainer and save_pretrained then refuse what is a plain float model.
            quantization_config=GgufConfig(dequantize=True),
        )


def _locate(source: str) -> tuple[str, dict[str, str]]:
    """What to hand to ``from_pretrained``: a name, and ``gguf_file`` if it is one."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(_not_a_model(path))
        return str(path), {}
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(
                    f"{source} is not a GGUF file. A model is a directory with a config.json, "
                    "a Hub id, or a .gguf file."
                )
        return str(path.parent), {"gguf_file": path.name}
    if not is_hub_id(source):
        raise ModelError(f"{source} does not exist.")
    return source, {}


def _not_a_model(path: Path) -> str:
    found = sorted(entry.name for entry in path.iterdir())
    message = f"{path} is not a model directory: it has no config.json"
    message += (
        f" (it holds {', '.join(found[:5])}{', …' if len(found) > 5 else ''})." if found else "."
    )
    gguf = [name for name in found if name.endswith(".gguf")]
    if gguf:
        return f"{message} To load the GGUF file in it, name the file: {path / gguf[0]}"
    if (path / "merged" / "config.json").is_file():
        return f"{message} To load the merged model in it, name it: {path / 'merged'}"
    return message


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turns whatever a loader raises into a ModelError that says which model it was."""
    try:
        yield
    except Exception as error:  # a foreign file read by several libraries: anything can come out
        raise ModelError(f"{source} cannot be loaded: {error}") from error
