"""Telling a Hub id from a path that does not exist."""

import re
from pathlib import Path

FILE_SUFFIXES = {".txt", ".text", ".md", ".json", ".jsonl", ".csv", ".parquet", ".gguf"}


def is_hub_id(source: str) -> bool:
    """Whether ``name`` or ``org/name`` can be meant; a path or a file name cannot."""
    if Path(source).suffix in FILE_SUFFIXES:
        return False
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is not None
