"""Rules: which sites a name, a regex or a callable names."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from oftfx.errors import SpecError

if TYPE_CHECKING:
    from oftfx.plan import Site

Target: TypeAlias = str | re.Pattern[str]
Targets: TypeAlias = Target | Sequence[Target] | Callable[["Site"], bool]

ALL_LINEAR = "all-linear"


def matches(rule: Target, fqn: str) -> bool:
    """Whether a rule names this site: its fqn, its last components, or a regex over all of it."""
    if isinstance(rule, re.Pattern):
        return rule.fullmatch(fqn) is not None
    return fqn == rule or fqn.endswith("." + rule) or re.fullmatch(rule, fqn) is not None


def exactly(fqn: str) -> str:
    """The rule for one name, and no other that ends with it."""
    return f"(?:{re.escape(fqn)})"


def checked_rules(field: str, value: Target | Sequence[Target]) -> tuple[Target, ...]:
    """One or several rules as a tuple of checked ones.

    Raises:
        SpecError: One is no name and no regex. Names the field.
    """
    rules = (value,) if isinstance(value, (str, re.Pattern)) else value
    if not isinstance(rules, Sequence):
        raise SpecError(f"{field}={value!r}: must be a name, a regex, or a sequence of them.")
    for rule in rules:
        text = rule.pattern if isinstance(rule, re.Pattern) else rule
        if not isinstance(text, str):
            raise SpecError(
                f"{field} holds {rule!r}: every rule must be a name or a regex of text."
            )
        try:
            re.compile(rule)
        except re.error as error:
            raise SpecError(f"{field} holds {rule!r}, which is no valid regex: {error}.") from error
    return tuple(rules)
