"""The errors oftfx raises: one hierarchy, each message says what, where and what to do."""

from collections.abc import Iterable


class OftfxError(Exception):
    """Base of every error raised on purpose by oftfx."""


class SpecError(OftfxError, ValueError):
    """A spec field has a value outside its range; raised when the spec is constructed."""


class CaptureError(OftfxError):
    """The model could not be traced to a graph; names the line of the user's code."""


class PlanError(OftfxError):
    """The spec and the model do not fit together, or the model is not in the expected state."""


def no_adapter(where: str, name: str | None, held: Iterable[str]) -> PlanError:
    """What to raise where there is no such adapter, or none at all for None.

    Args:
        where: What should have had it.
        name: The adapter.
        held: Those that it has.
    """
    which = "" if name is None else f" {name!r}"
    names = sorted(held)
    return PlanError(f"{where} has no adapter{which}{f'; it has {names}' if names else ''}.")


class CheckpointError(OftfxError):
    """An adapter directory is damaged, foreign, or belongs to another base model."""


class MergeError(OftfxError):
    """A rotation cannot be folded into its weight; the model is left as it was."""


class OftfxWarning(UserWarning):
    """Something works but deserves attention."""
