"""What the specs of all methods share."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from oftfx.errors import SpecError
from oftfx.spec.fields import (
    check_int,
    check_number,
    check_type,
    nearest,
    value_from_json,
    value_to_json,
)
from oftfx.spec.rules import ALL_LINEAR, Target, Targets, checked_rules, matches

METHODS: dict[str, type["Spec"]] = {}
"""Every method's spec by the name that files know it by."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Fields every method shares: which sites, and how their parameters are made.

    Attributes:
        targets: ``"all-linear"`` (every matmul with a frozen weight but the output head and the
            MoE routers), or one or several names and regexes, or a callable ``Site -> bool``.
            An embedding is one only when it is named: what it looks up is rotated.
            A name matches a site when it equals the site's fqn or its last components; a regex
            must match the whole fqn.
        exclude: Names and regexes that are left out; they win over ``targets``.
        overrides: ``{name or regex: {field: value}}``; the last match wins. Only fields of the
            method can be overridden, not these rules.
        also_train: Names and regexes of further tensors of the base that are trained as they are, a
            new head or the biases: a rule names a parameter, or a module with all parameters in it.
            They win over ``targets``. The base's own are kept beside the trained copies, for
            [`oftfx.disabled`][oftfx.disabled] and [`oftfx.remove`][oftfx.remove].
        share_inputs: One rotation per input tensor, so that q/k/v (and gate/up) share theirs.
        dtype: Floating dtype of the trainable parameters.
        seed: Seeds the initial values, per site, independent of device and order.
        init_std: Standard deviation of the initial parameters around those of the identity. 0
            starts at the identity.

    Raises:
        SpecError: A field is outside its range. Names the field and the range.
    """

    targets: Targets = ALL_LINEAR
    exclude: Target | Sequence[Target] = ()
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, hash=False)
    also_train: Target | Sequence[Target] = ()
    share_inputs: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    init_std: float = 0.0

    def __post_init__(self) -> None:
        if type(self) is Spec:
            raise SpecError(f"Spec is of no method: use one of {sorted(METHODS)}.")
        if self.targets != ALL_LINEAR and not callable(self.targets):
            object.__setattr__(self, "targets", checked_rules("targets", self.targets))
            if not self.targets:
                raise SpecError(f"targets is empty: name at least one site, or use {ALL_LINEAR!r}.")
        for field in ("exclude", "also_train"):
            object.__setattr__(self, field, checked_rules(field, getattr(self, field)))
        object.__setattr__(self, "overrides", self._checked_overrides())
        check_type(self, "share_inputs", bool)
        floating = isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        if not (floating and self.dtype.itemsize > 1):  # float8 has no arithmetic
            raise SpecError(f"dtype={self.dtype!r}: must be a floating torch.dtype of ≥ 16 bits.")
        check_int(self, "seed", minimum=0)
        check_number(self, "init_std")

    def _checked_overrides(self) -> Mapping[str, Mapping[str, Any]]:
        if not isinstance(self.overrides, Mapping):
            raise SpecError(
                f"overrides={self.overrides!r}: must be a mapping {{name: {{field: value}}}}."
            )
        allowed = self.method_fields()
        for pattern, fields in self.overrides.items():
            if not isinstance(pattern, str):
                raise SpecError(f"overrides has the key {pattern!r}: must be a name or regex text.")
            checked_rules("overrides", pattern)
            if not isinstance(fields, Mapping):
                raise SpecError(f"overrides[{pattern!r}]={fields!r}: must be a mapping of fields.")
            for key in fields:
                if key not in allowed:
                    raise SpecError(
                        f"overrides[{pattern!r}] sets {key!r}, which is not a field of "
                        f"{type(self).__name__} that can differ per layer"
                        f"{nearest(str(key), allowed)}. "
                        f"Fields: {', '.join(sorted(allowed))}."
                    )
            # Constructing the overridden spec validates the values now, not at the first match.
            dataclasses.replace(self, overrides={}, **fields)
        return {pattern: dict(fields) for pattern, fields in self.overrides.items()}

    @classmethod
    def method_fields(cls) -> frozenset[str]:
        """Names of the fields that may differ per layer."""
        rules = {"targets", "exclude", "overrides", "also_train", "share_inputs", "seed"}
        return frozenset(f.name for f in dataclasses.fields(cls)) - rules

    def at(self, fqn: str) -> Self:
        """The spec that holds at one site: overrides applied."""
        changes: dict[str, Any] = {}
        for pattern, fields in self.overrides.items():
            if matches(pattern, fqn):
                changes |= fields
        return dataclasses.replace(self, **changes) if changes else self

    def without_rules(self) -> Self:
        """The spec less which sites it is for, and what it trains beside them."""
        return dataclasses.replace(
            self, targets=ALL_LINEAR, exclude=(), overrides={}, also_train=()
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict of the fields that differ from their defaults.

        Raises:
            SpecError: ``targets`` is a callable, which no file can hold.
        """
        if callable(self.targets):
            raise SpecError("targets is a callable: it cannot be written as JSON; name the sites.")
        out: dict[str, Any] = {"method": type(self).__name__}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            else:
                default = field.default
            if value != default:
                out[field.name] = value_to_json(value)
        return out

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Spec":
        """The spec written by [`to_json`][oftfx.Spec.to_json].

        Raises:
            SpecError: Unknown method or field, or a value out of range.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f"{data!r} is no spec: it must be a mapping of fields.")
        fields = dict(data)
        name = fields.pop("method", None)
        if not isinstance(name, str) or name not in METHODS:
            raise SpecError(f"unknown method {name!r}; this version knows {sorted(METHODS)}.")
        cls = METHODS[name]
        known = {f.name for f in dataclasses.fields(cls)}
        for key in fields:
            if key not in known:
                raise SpecError(f"{name} has no field {key!r}{nearest(str(key), known)}.")
        return cls(**{key: value_from_json(key, value) for key, value in fields.items()})
