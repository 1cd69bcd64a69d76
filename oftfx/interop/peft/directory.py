"""The two files of a PEFT directory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from oftfx.errors import CheckpointError

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
"""What PEFT puts before the base's own names."""
COMMON = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "inference_mode",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    }
)
"""The fields of every method's config, but that PSOFT's has no bias."""


@dataclass(frozen=True)
class Directory:
    """What was read, each part whole by itself.

    Attributes:
        path: Where.
        config: ``adapter_config.json``.
        tensors: ``adapter_model.safetensors``, under the base's own names.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def method(self) -> str:
        """PEFT's name of the method."""
        return str(self.config["peft_type"])

    def value(self, key: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        """A field of the config, of the type it must have.

        Raises:
            CheckpointError: It has another.
        """
        value = self.config.get(key, default)
        # JSON has no other numbers than these two, and True is an int to Python.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.path / CONFIG}: {key!r} is {value!r}.")
        return value

    @property
    def version(self) -> tuple[int, int]:
        """The minor version that wrote it; (0, 17) when it does not say, as none did before 0.18.

        Raises:
            CheckpointError: It is no version number.
        """
        text = self.config.get("peft_version") or "0.17"
        try:
            major, minor, *_ = str(text).split(".")
            return int(major), int(minor)
        except ValueError as error:
            raise CheckpointError(f"{self.path / CONFIG}: peft_version is {text!r}.") from error


def holds_peft(path: Path) -> bool:
    """Whether a directory looks like one that PEFT wrote."""
    return (path / CONFIG).is_file()


def read_directory(path: Path) -> Directory:
    """Reads and checks a directory by itself; nothing in it is executed.

    Raises:
        CheckpointError: A file is missing, damaged, or a pickle.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        config = json.loads((path / CONFIG).read_text("utf-8"))
        if not isinstance(config, dict) or "peft_type" not in config:
            raise ValueError("it names no peft_type")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / CONFIG} is damaged or foreign: {error}.") from error
    file = path / TENSORS
    if not file.is_file():
        pickle = (path / PICKLE).is_file()
        hint = (
            f": {PICKLE} is a pickle, which may execute code and is not read. Load it with PEFT "
            "and save it again with safe_serialization=True"
        )
        raise CheckpointError(f"{file} is missing{hint if pickle else ''}.")
    try:
        tensors = load(file.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file: {error}.") from error
    if foreign := sorted(key for key in tensors if not key.startswith(PREFIX)):
        raise CheckpointError(f"{file} holds tensors PEFT does not write: {', '.join(foreign)}.")
    return Directory(path, config, {key.removeprefix(PREFIX): v for key, v in tensors.items()})
