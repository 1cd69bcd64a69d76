"""The fields of a spec: what their values may be, and how JSON holds them."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from oftfx.errors import SpecError

if TYPE_CHECKING:
    from oftfx.spec.base import Spec


def check_int(spec: "Spec", field: str, minimum: int) -> None:
    """An integer of at least ``minimum``."""
    value = getattr(spec, field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(f"{field}={value!r}: must be an integer ≥ {minimum}.")
    if value < minimum:
        raise SpecError(f"{field}={value}: must be ≥ {minimum}.")


def check_number(spec: "Spec", field: str, below: float = math.inf) -> None:
    """A number from 0 on, below ``below``."""
    value = getattr(spec, field)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpecError(f"{field}={value!r}: must be a number ≥ 0.")
    if not 0 <= value < below:
        most = "finite" if below == math.inf else f"< {below:g}"
        raise SpecError(f"{field}={value!r}: must be {most} and ≥ 0.")


def check_choice(spec: "Spec", field: str, choices: tuple[str, ...]) -> None:
    """One of these texts."""
    value = getattr(spec, field)
    if value not in choices:
        raise SpecError(f"{field}={value!r}: must be one of {', '.join(map(repr, choices))}.")


def check_series(spec: Any) -> None:
    """The fields that say how a skew matrix becomes a rotation."""
    check_int(spec, "order", minimum=1)
    check_type(spec, "exact", bool)
    check_type(spec, "unit_rate", bool)
    if spec.guard not in (None, "rescale", "exact"):
        raise SpecError(f"guard={spec.guard!r}: must be None, 'rescale' or 'exact'.")


def check_type(spec: "Spec", field: str, kind: type) -> None:
    """A value of this type."""
    value = getattr(spec, field)
    if not isinstance(value, kind):
        raise SpecError(f"{field}={value!r}: must be a {kind.__name__}.")


def nearest(key: str, known: "frozenset[str] | set[str]") -> str:
    """The known name that a key may have meant, as words to end a message with."""
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def value_to_json(value: Any) -> Any:
    """One field's value as JSON has it."""
    match value:
        case torch.dtype():
            return str(value).removeprefix("torch.")
        case re.Pattern():
            flags = value.flags & ~re.UNICODE
            return {"regex": value.pattern} | ({"flags": flags} if flags else {})
        case Mapping():
            return {key: value_to_json(item) for key, item in value.items()}
        case tuple():
            return [value_to_json(item) for item in value]
        case _:
            return value


def value_from_json(key: str, value: Any) -> Any:
    """One field's value; what is no valid one stays as it is, for the constructor to refuse."""
    match key, value:
        case "dtype", str():
            return getattr(torch, value, value)
        case (("targets" | "exclude" | "also_train"), list()):
            return [value_from_json("rule", rule) for rule in value]
        case "rule", {"regex": str(pattern)}:
            try:
                return re.compile(pattern, dict(value).get("flags", 0))
            except (re.error, TypeError, ValueError):
                return pattern
        case "overrides" | "fields", Mapping():
            below = "fields" if key == "overrides" else None
            return {name: value_from_json(below or name, item) for name, item in value.items()}
        case _:
            return value
