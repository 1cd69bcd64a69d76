"""Text files and datasets → blocks of tokens, all of one length."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oftfx.train.errors import DataError
from oftfx.train.sources import is_hub_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

KINDS = (("text",), ("messages",), ("prompt", "completion"))
"""The fields that a row may hold."""

IGNORED = -100
"""The label of a token that is read and not learned."""


def read(source: str) -> "Dataset":
    """Reads documents into a dataset with the columns of one of ``KINDS``.

    Args:
        source: A text file (one document), a ``.jsonl`` file (one document a line), or the id of a
            dataset on the Hub with a ``train`` split. A document is a ``text``; a list of
            ``messages``, each with a ``role`` and a ``content``; or a ``prompt`` with the
            ``completion`` that is to be learned.

    Raises:
        DataError: The source is missing, empty, not text, or its rows are none of these.
    """
    from datasets import Dataset

    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(
            f"{source} is a directory: name a text file, a .jsonl file or a dataset id."
        )
    if path.is_file():
        text = _decode(path)
        rows = list(_jsonl(path, text)) if path.suffix == ".jsonl" else [{"text": text}]
        return Dataset.from_list(rows)
    if not is_hub_id(source):
        raise DataError(f"{source} does not exist.")
    return _from_hub(source)


def pack(documents: "Dataset", tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> "Dataset":
    """Tokenises documents, joins them end to end, and cuts blocks of ``seq_len`` tokens.

    Every document is closed by the tokenizer's end-of-text token, where it has one and the
    tokenizer's chat template, by which messages become text, has not done so. The last tokens, too
    few for a block, are dropped, and blocks in which nothing is to be learned.

    Args:
        documents: What [`read`][oftfx.train.data.read] returns.
        tokenizer: The model's own.
        seq_len: Tokens in a block.

    Returns:
        A dataset of ``input_ids`` and ``labels``: int64 tensors of shape ``(seq_len,)``; the labels
        of a prompt are ``IGNORED``.

    Raises:
        DataError: The documents are messages, and the tokenizer has no chat template for them.
    """
    from datasets import Features, Sequence, Value

    end = tokenizer.eos_token_id
    # What is too little for a block waits for the next batch of documents.
    stream: list[int] = []
    labels: list[int] = []

    def tokens(text: str) -> list[int]:
        # verbose=False: a book is longer than the model's context, which is why it is cut here.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)

    def chat(messages: list[dict[str, str]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is a program: roles it refuses, or there is none
            raise DataError(f"the tokenizer makes no text of messages: {error}") from error

    def blocks(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        texts = [chat(each) for each in batch["messages"]] if "messages" in batch else None
        prompts = batch.get("prompt")
        for i, text in enumerate(texts or batch.get("text") or batch["completion"]):
            before, ids = tokens(prompts[i]) if prompts else [], tokens(text)
            if end is not None and ids[-1:] != [end]:
                ids.append(end)
            stream.extend(before + ids)
            labels.extend([IGNORED] * len(before) + ids)
        whole = len(stream) // seq_len * seq_len
        cuts = [slice(i - seq_len, i) for i in range(seq_len, whole + 1, seq_len)]
        # The first label of a block is never asked for.
        cuts = [cut for cut in cuts if any(label != IGNORED for label in labels[cut][1:])]
        found = {"input_ids": [stream[c] for c in cuts], "labels": [labels[c] for c in cuts]}
        del stream[:whole], labels[:whole]
        return found

    row = Sequence(Value("int64"))
    packed = documents.map(
        blocks,
        batched=True,
        remove_columns=documents.column_names,
        features=Features({"input_ids": row, "labels": row}),  # a batch may make no block
    )
    return packed.with_format("torch")


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch for a causal language model, which shifts the labels itself.

    Args:
        rows: ``input_ids`` and, where they differ from these, ``labels``, of shape ``(seq_len,)``.

    Returns:
        Both, of shape ``(batch, seq_len)``.
    """
    labels = torch.stack([row.get("labels", row["input_ids"]) for row in rows])
    return {"input_ids": torch.stack([row["input_ids"] for row in rows]), "labels": labels}


def split(blocks: "Dataset", fraction: float) -> tuple["Dataset", "Dataset"]:
    """Splits off the last of two or more blocks as held-out text, at least one on each side.

    The tail of a text, not blocks drawn from between: a neighbour gives too much away.
    """
    held_out = round(fraction * len(blocks))
    kept = len(blocks) - min(max(1, held_out), len(blocks) - 1)
    return blocks.select(range(kept)), blocks.select(range(kept, len(blocks)))


def spread(blocks: "Dataset", count: int) -> "Dataset":
    """At most ``count`` blocks, evenly spaced, so that a sample sees the whole text."""
    if len(blocks) <= count:
        return blocks
    return blocks.select([index * len(blocks) // count for index in range(count)])


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
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


def _jsonl(path: Path, text: str) -> Iterator[dict[str, Any]]:
    fields: tuple[str, ...] | None = None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg}.") from error
        except (ValueError, RecursionError) as error:  # a number too long, or brackets too deep
            raise DataError(f"{where} is not JSON that can be read: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} is not a JSON object with a 'text' field.")
        fields = fields or _kind(row, where)
        if not set(fields) <= row.keys():
            raise DataError(f"{where} has no {_named(fields)}, as the lines before it have.")
        for field in fields:
            if field == "messages":
                _check_messages(row[field], where)
            elif not isinstance(row[field], str):
                raise DataError(f"{where} has no {field!r} field with a string.")
        found = {field: row[field] for field in fields}
        _check_characters(found, where)
        yield found


def _kind(row: Iterable[str], where: str) -> tuple[str, ...]:
    """The fields to read of rows like this one."""
    names = set(row)
    found = next((fields for fields in KINDS if names.issuperset(fields)), None)
    if found is None:
        wanted = ", or ".join(map(_named, KINDS))
        has = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where} has no {wanted}; its fields: {has}.")
    return found


def _named(fields: tuple[str, ...]) -> str:
    return " with ".join(map(repr, fields))


def _check_messages(messages: Any, where: str) -> None:
    """That messages are what every chat template knows, so that nothing of them is left out."""
    fine = isinstance(messages, list) and messages
    if not fine or any(
        not isinstance(message, dict)
        or message.keys() != {"role", "content"}
        or not all(isinstance(value, str) for value in message.values())
        for message in messages
    ):
        raise DataError(
            f"{where}: 'messages' must be a list of objects with a 'role' and a 'content', both "
            "strings, and nothing else."
        )


def _check_characters(row: dict[str, Any], where: str) -> None:
    """That no half of a pair of surrogates is left, which JSON can write and no text has."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(
            f"{where} is not text: it has {half}, which is half a character: cut text between "
            "characters, not between UTF-16 units."
        ) from error


def _from_hub(source: str) -> "Dataset":
    from datasets import load_dataset

    try:
        dataset = load_dataset(source, split="train")
    except Exception as error:  # the network, the Hub and any file format can fail here
        raise DataError(f"{source} is neither a file nor a dataset that loads: {error}") from error
    return dataset.select_columns(list(_kind(dataset.column_names, source)))
