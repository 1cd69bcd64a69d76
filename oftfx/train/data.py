"""Text files and datasets → blocks of tokens, all of one length."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oftfx.train.errors import DataError
from oftfx.train.sources import is_hub_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FIELD = "text"


def read(source: str) -> "Dataset":
    """Reads documents into a dataset with one column, ``text``.

    Args:
        source: A text file (one document), a ``.jsonl`` file (one document a line, in its
            ``"text"`` field), or the id of a dataset on the Hub with a ``train`` split.

    Raises:
        DataError: The source is missing, empty, not text, or has no ``text`` field.
    """
    from datasets import Dataset

    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(
            f"{source} is a directory: name a text file, a .jsonl file or a dataset id."
        )
    if path.is_file():
        text = _decode(path)
        documents = list(_jsonl(path, text)) if path.suffix == ".jsonl" else [text]
        return Dataset.from_dict({FIELD: documents})
    if not is_hub_id(source):
        raise DataError(f"{source} does not exist.")
    return _from_hub(source)


def pack(documents: "Dataset", tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> "Dataset":
    """Tokenises documents, joins them end to end, and cuts blocks of ``seq_len`` tokens.

    Every document is closed by the tokenizer's end-of-text token, where it has one. The last
    tokens, too few for a block, are dropped.

    Args:
        documents: What [`read`][oftfx.train.data.read] returns.
        tokenizer: The model's own.
        seq_len: Tokens in a block.

    Returns:
        A dataset with one column, ``input_ids``: int64 tensors of shape ``(seq_len,)``.
    """

    def blocks(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        stream: list[int] = []
        # verbose=False: a book is longer than the model's context, which is why it is cut here.
        for ids in tokenizer(batch[FIELD], add_special_tokens=False, verbose=False)["input_ids"]:
            stream += ids
            if tokenizer.eos_token_id is not None:
                stream.append(tokenizer.eos_token_id)
        ends = range(seq_len, len(stream) + 1, seq_len)
        return {"input_ids": [stream[end - seq_len : end] for end in ends]}

    packed = documents.map(blocks, batched=True, remove_columns=documents.column_names)
    return packed.with_format("torch")


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch for a causal language model, which shifts the labels itself.

    Returns:
        ``input_ids`` and ``labels``, both of shape ``(batch, seq_len)``.
    """
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def split(blocks: "Dataset", fraction: float) -> tuple["Dataset", "Dataset"]:
    """Splits off the last blocks, at least one, as held-out text.

    The tail of a text, not blocks drawn from between: a neighbour gives too much away.
    """
    kept = len(blocks) - max(1, round(fraction * len(blocks)))
    return blocks.select(range(kept)), blocks.select(range(kept, len(blocks)))


def spread(blocks: "Dataset", count: int) -> "Dataset":
    """At most ``count`` blocks, evenly spaced, so that a sample sees the whole text."""
    if len(blocks) <= count:
        return blocks
    return blocks.select([index * len(blocks) // count for index in range(count)])


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    if b"\0" in raw:
        raise DataError(f"{path} is not text: it has a NUL byte at offset {raw.index(0)}.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start}. "
            "Convert it first, for example with iconv -t utf-8."
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty.")
    return text


def _jsonl(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} is not a JSON object with a {FIELD!r} field.")
        if not isinstance(row.get(FIELD), str):
            found = ", ".join(map(repr, row)) or "none"
            raise DataError(f"{where} has no {FIELD!r} field with a string; its fields: {found}.")
        yield row[FIELD]


def _from_hub(source: str) -> "Dataset":
    from datasets import load_dataset

    try:
        dataset = load_dataset(source, split="train")
    except Exception as error:  # the network, the Hub and any file format can fail here
        raise DataError(f"{source} is neither a file nor a dataset that loads: {error}") from error
    if FIELD not in dataset.column_names:
        found = ", ".join(map(repr, dataset.column_names))
        raise DataError(f"{source} has no {FIELD!r} column; its columns: {found}.")
    return dataset.select_columns([FIELD])
