"""Orthogonal finetuning as a compiler pass for PyTorch."""

from oftfx.adapter import adapt, disabled, parameters, remove
from oftfx.adapters import Adapter, adapters, interpolate, rows, scale, use
from oftfx.calibrate import Calibration, calibrate
from oftfx.checkpoint import load, save
from oftfx.compile import compile
from oftfx.constrain import penalty, project
from oftfx.errors import (
    CaptureError,
    CheckpointError,
    MergeError,
    OftfxError,
    OftfxWarning,
    PlanError,
    SpecError,
)
from oftfx.explain import ExplainedSite, Explanation, explain
from oftfx.export import export
from oftfx.fold import MergedSite, MergeReport, merge
from oftfx.health import Health, health
from oftfx.plan import Group, Plan, Site, Skip, plan
from oftfx.regions import differentiable
from oftfx.spec import BOFT, COFT, GOFT, HRA, LOFT, OFT, PSOFT, QGOFT, Spec

__version__ = "0.1.0"

__all__ = [
    "BOFT",
    "COFT",
    "GOFT",
    "HRA",
    "LOFT",
    "OFT",
    "PSOFT",
    "QGOFT",
    "Adapter",
    "Calibration",
    "CaptureError",
    "CheckpointError",
    "ExplainedSite",
    "Explanation",
    "Group",
    "Health",
    "MergeError",
    "MergeReport",
    "MergedSite",
    "OftfxError",
    "OftfxWarning",
    "Plan",
    "PlanError",
    "Site",
    "Skip",
    "Spec",
    "SpecError",
    "adapt",
    "adapters",
    "calibrate",
    "compile",
    "differentiable",
    "disabled",
    "explain",
    "export",
    "health",
    "interpolate",
    "load",
    "merge",
    "parameters",
    "penalty",
    "plan",
    "project",
    "remove",
    "rows",
    "save",
    "scale",
    "use",
]
