"""The errors oftfx raises: one hierarchy, each message says what, where and what to do."""


class OftfxError(Exception):
    """Base of every error raised on purpose by oftfx."""


class SpecError(OftfxError, ValueError):
    """A spec field has a value outside its range; raised when the spec is constructed."""


class CaptureError(OftfxError):
    """The model could not be traced to a graph; names the line of the user's code."""


class PlanError(OftfxError):
    """The spec and the model do not fit together, or the model is not in the expected state."""


class CheckpointError(OftfxError):
    """An adapter directory is damaged, foreign, or belongs to another base model."""


class MergeError(OftfxError):
    """A rotation cannot be folded into its weight; the model is left as it was."""


class OftfxWarning(UserWarning):
    """Something works but deserves attention."""
