"""Work on parameters that is one op, each of a function in `rotations/`."""

from oftfx.ops.opaque import opaque
from oftfx.rotations import cayley, householder

reflections = opaque("reflections", householder.compact, outputs=2)
"""`oftfx::reflections`: u, (…, r, d), to the support and the kernel of their product."""

spectral_norm = opaque("spectral_norm", cayley.spectral_norm, outputs=1)
"""`oftfx::spectral_norm`: skew Q, (…, b, b), to ``‖Q‖₂``, (…)."""
