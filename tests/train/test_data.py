import errno
import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from oftfx.train import data
from oftfx.train.errors import DataError


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    assert data.read(str(path))["text"] == ["one\n\ntwo\n"]


def test_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone")
    assert data.read(str(path))["text"] == ["one"]


def test_jsonl_is_one_document_a_line(tmp_path):
    # U+2028 ends a line for str.splitlines, but not in JSON.
    rows = [{"text": "one\ntwo", "id": 1}, {"text": "three\u2028four"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert data.read(str(path))["text"] == ["one\ntwo", "three\u2028four"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\n", "is empty"),
        ("a.txt", b"text\0more", "NUL byte at offset 4"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8 text: byte 0xe9 at offset 3"),
        ("a.jsonl", b'{"text": "x"}\nnope', "line 2 is not JSON"),
        ("a.jsonl", b"[1, 2]", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"prompt": "x", "reply": "y"}', "its fields: 'prompt', 'reply'"),
        ("a.jsonl", b'{"text": 3}', "no 'text' field with a string"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "line 1 is not JSON that can be"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON that can be read"),
        ("a.jsonl", rb'{"text": "a\ud83d"}', r"line 1 is not text: it has \\ud83d, which is half"),
        (
            "a.jsonl",
            rb'{"messages": [{"role": "user", "content": "\ude00"}]}',
            r"line 1 is not text: it has \\ude00",
        ),
        ("a.jsonl", b'{"prompt": "x", "completion": null}', "no 'completion' field with a string"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"messages": []}',
            "line 2 has no 'text', as the lines before",
        ),
        ("a.jsonl", b'{"messages": []}', "line 1: 'messages' must be a list"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 1}]}', "both strings"),
        ("a.jsonl", b'{"messages": [{"role": "a", "content": "", "name": ""}]}', "nothing else"),
    ],
)
def test_bad_files_are_explained(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        data.read(str(path))
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = tmp_path / "a.txt"
    path.write_text("x")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied"):
        data.read(str(path))


@pytest.mark.parametrize("source", ["nowhere.txt", "./nowhere", "/no/where", "a/b/c.jsonl"])
def test_missing_file(source):
    with pytest.raises(DataError, match="does not exist"):
        data.read(source)


def test_a_dataset_of_the_hub(monkeypatch):
    rows = Dataset.from_dict({"id": [1, 2], "text": ["one", "two"]})
    known = {("org/name", "train"): rows, ("org/other", "train"): rows.select_columns("id")}
    monkeypatch.setattr("datasets.load_dataset", lambda source, split: known[source, split])
    assert data.read("org/name").to_dict() == {"text": ["one", "two"]}
    with pytest.raises(DataError, match=r"org/other has no 'text', .*its fields: 'id'"):
        data.read("org/other")
    with pytest.raises(DataError, match="org/none is neither a file nor a dataset that loads"):
        data.read("org/none")


def test_directory(tmp_path):
    with pytest.raises(DataError, match="is a directory"):
        data.read(str(tmp_path))


def test_pack_keeps_every_token_in_order(tokenizer):
    documents = Dataset.from_dict({"text": ["abcdef", "gh", "ijk"]})
    blocks = data.pack(documents, tokenizer, 4)
    stream = torch.cat([row["input_ids"] for row in blocks]).tolist()
    whole = []
    for text in documents["text"]:
        whole += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert stream == whole[: len(whole) // 4 * 4]
    assert all(row["input_ids"].shape == (4,) for row in blocks)


def test_only_completions_are_learned(tokenizer, tmp_path):
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "efghij", "completion": "kl", "id": 1}]
    documents = data.read(write(tmp_path / "a.jsonl", rows))
    blocks = data.pack(documents, tokenizer, 4)
    end = tokenizer.eos_token

    def shown(ids):
        return tokenizer.decode(ids).replace(end, ".")

    assert [shown(row["input_ids"]) for row in blocks] == ["abcd", "hijk"]  # ".efg" asks nothing
    asked = [row["labels"][row["labels"] != data.IGNORED] for row in blocks]
    assert [shown(labels) for labels in asked] == ["cd", "k"]


def test_messages_become_text_by_the_tokenizers_template(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    documents = data.read(write(tmp_path / "a.jsonl", [{"messages": chat}]))
    with pytest.raises(DataError, match="the tokenizer makes no text of messages"):
        data.pack(documents, tokenizer, 4)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }} {% endfor %}"
    (block,) = data.pack(documents, tokenizer, 9)
    assert tokenizer.decode(block["input_ids"]) == "u:ab a:c "
    assert torch.equal(block["labels"], block["input_ids"])


def test_pack_drops_the_last_tokens_of_all_and_no_others(tokenizer):
    """However many batches the documents are read in."""
    documents = Dataset.from_dict({"text": [f"{n:05}" for n in range(2500)]})
    blocks = data.pack(documents, tokenizer, 7000)
    assert len(blocks) == 2500 * 6 // 7000
    stream = torch.cat([row["input_ids"] for row in blocks])
    text = tokenizer.decode(stream).replace(tokenizer.eos_token, " ")
    assert text == "".join(f"{n:05} " for n in range(2500))[: len(text)]
    assert torch.equal(stream, torch.cat([row["labels"] for row in blocks]))


def test_pack_of_too_little_text_is_empty(tokenizer):
    assert len(data.pack(Dataset.from_dict({"text": ["abc"]}), tokenizer, 64)) == 0


@pytest.mark.parametrize(("fraction", "held"), [(0.01, 1), (0.3, 3), (0.99, 9)])
def test_split_holds_out_the_end_and_leaves_a_block_to_train_on(fraction, held):
    blocks = Dataset.from_dict({"input_ids": [[i] for i in range(10)]})
    train, held_out = data.split(blocks, fraction)
    assert [row[0] for row in train["input_ids"]] == list(range(10 - held))
    assert [row[0] for row in held_out["input_ids"]] == list(range(10 - held, 10))


def test_spread_sees_the_whole_text():
    blocks = Dataset.from_dict({"input_ids": [[i] for i in range(10)]})
    assert data.spread(blocks, 20) is blocks
    assert [row[0] for row in data.spread(blocks, 4)["input_ids"]] == [0, 2, 5, 7]


def test_labels_are_the_inputs():
    batch = data.collate([{"input_ids": torch.arange(3)}, {"input_ids": torch.arange(3, 6)}])
    assert batch["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
    torch.testing.assert_close(batch["labels"], batch["input_ids"])
