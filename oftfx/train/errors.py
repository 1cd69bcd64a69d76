"""What can go wrong around training; part of the one hierarchy of `oftfx.errors`."""

from oftfx.errors import OftfxError


class DataError(OftfxError):
    """Training text is missing, empty, too short, or not text."""


class ModelError(OftfxError):
    """A model cannot be found or loaded."""


class OutputError(OftfxError):
    """The place to write to is taken."""


class TrainingError(OftfxError):
    """Training came to nothing: a loss is no longer a finite number."""
