"""What the user asks for: frozen, hashable, validated dataclasses."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import torch

from oftfx.errors import SpecError

if TYPE_CHECKING:
    from oftfx.plan import Site

Target: TypeAlias = str | re.Pattern[str]
Targets: TypeAlias = Target | Sequence[Target] | Callable[["Site"], bool]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Fields every method shares: which sites, and how their parameters are made.

    Attributes:
        targets: ``"all-linear"`` (every matmul with a frozen weight but the output head and the
            MoE routers), or one or several names and regexes, or a callable ``Site -> bool``.
            A name matches a site when it equals the site's fqn or its last components; a regex
            must match the whole fqn.
        exclude: Names and regexes that are left out; they win over ``targets``.
        overrides: ``{name or regex: {field: value}}``; the last match wins. Only fields of the
            method can be overridden, not these rules.
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
    share_inputs: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    init_std: float = 0.0

    def __post_init__(self) -> None:
        if self.targets != ALL_LINEAR and not callable(self.targets):
            object.__setattr__(self, "targets", _rules("targets", self.targets))
            if not self.targets:
                raise SpecError(f"targets is empty: name at least one site, or use {ALL_LINEAR!r}.")
        object.__setattr__(self, "exclude", _rules("exclude", self.exclude))
        object.__setattr__(self, "overrides", self._checked_overrides())
        _check_type(self, "share_inputs", bool)
        floating = isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        if not (floating and self.dtype.itemsize > 1):  # float8 has no arithmetic
            raise SpecError(f"dtype={self.dtype!r}: must be a floating torch.dtype of ≥ 16 bits.")
        _check_int(self, "seed", minimum=0)
        _check_number(self, "init_std")

    def _checked_overrides(self) -> Mapping[str, Mapping[str, Any]]:
        if not isinstance(self.overrides, Mapping):
            raise SpecError(
                f"overrides={self.overrides!r}: must be a mapping {{name: {{field: value}}}}."
            )
        allowed = self.method_fields()
        for pattern, fields in self.overrides.items():
            if not isinstance(pattern, str):
                raise SpecError(f"overrides has the key {pattern!r}: must be a name or regex text.")
            _rules("overrides", pattern)
            if not isinstance(fields, Mapping):
                raise SpecError(f"overrides[{pattern!r}]={fields!r}: must be a mapping of fields.")
            for key in fields:
                if key not in allowed:
                    raise SpecError(
                        f"overrides[{pattern!r}] sets {key!r}, which is not a field of "
                        f"{type(self).__name__} that can differ per layer{_nearest(key, allowed)}. "
                        f"Fields: {', '.join(sorted(allowed))}."
                    )
            # Constructing the overridden spec validates the values now, not at the first match.
            dataclasses.replace(self, overrides={}, **fields)
        return {pattern: dict(fields) for pattern, fields in self.overrides.items()}

    @classmethod
    def method_fields(cls) -> frozenset[str]:
        """Names of the fields that may differ per layer."""
        rules = {"targets", "exclude", "overrides", "share_inputs", "seed"}
        return frozenset(f.name for f in dataclasses.fields(cls)) - rules

    def at(self, fqn: str) -> Self:
        """The spec that holds at one site: overrides applied."""
        changes: dict[str, Any] = {}
        for pattern, fields in self.overrides.items():
            if matches(pattern, fqn):
                changes |= fields
        return dataclasses.replace(self, **changes) if changes else self

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
                out[field.name] = _to_json(value)
        return out

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Spec":
        """The spec written by [`to_json`][oftfx.Spec.to_json].

        Raises:
            SpecError: Unknown method or field, or a value out of range.
        """
        fields = dict(data)
        name = fields.pop("method", None)
        if name not in METHODS:
            raise SpecError(f"unknown method {name!r}; this version knows {sorted(METHODS)}.")
        cls = METHODS[name]
        known = {f.name for f in dataclasses.fields(cls)}
        for key in fields:
            if key not in known:
                raise SpecError(f"{name} has no field {key!r}{_nearest(key, known)}.")
        return cls(**{key: _from_json(key, value) for key, value in fields.items()})


@dataclass(frozen=True, kw_only=True)
class OFT(Spec):
    """Block-diagonal rotation of a layer's input: OFT, OFTv2.

    ``x ← x·blockdiag(R_1 … R_{d/b})`` with ``R_i`` in SO(b) from a skew ``Q_i``, ``b(b−1)/2``
    trainable numbers a block (OFT 2306.07280; OFTv2 2506.19847).

    Attributes:
        block_size: b, which must divide the layer's input width.
        order: k of the Cayley–Neumann series ``(I+Q)(I+Q+…+Q^k)``. Even k is quadratically
            closer to orthogonal than odd k.
        exact: The exact Cayley transform ``(I+Q)(I−Q)⁻¹`` instead of the series.
        guard: What to do as ‖Q‖₂ nears 1, beyond which the series means nothing: ``None`` leaves
            it (``oftfx.health`` warns); from ‖Q‖₂ = 0.9 on, ``"rescale"`` shrinks Q back to there
            and ``"exact"`` uses the exact transform for that block.
        share_blocks: One block's parameters for all blocks of a site.
        dropout: Probability with which a block is the identity in a forward in training mode
            (multiplicative dropout, BOFT 2311.06243).
    """

    block_size: int = 32
    order: int = 4
    exact: bool = False
    guard: Literal["rescale", "exact"] | None = None
    share_blocks: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_int(self, "block_size", minimum=2)
        _check_series(self)
        _check_type(self, "share_blocks", bool)
        _check_number(self, "dropout", below=1.0)


@dataclass(frozen=True, kw_only=True)
class COFT(OFT):
    """OFT that stays near the identity: every ``‖Q_i‖_F`` at most ``eps / √(d/b)``.

    The parameters themselves are projected, by [`oftfx.project`][oftfx.project] after each
    optimizer step (OFT 2306.07280).

    Attributes:
        eps: ‖Q‖_F that a whole site may reach.
    """

    eps: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number(self, "eps")


@dataclass(frozen=True, kw_only=True)
class BOFT(OFT):
    """A product of block-diagonal rotations, each over blocks of more distant coordinates.

    ``x ← x·F_{m−1} … F_0``, where a block of ``F_j`` takes two runs of b/2 neighbouring coordinates
    that start 2^j · b/2 apart, as a butterfly does: m factors join 2^{m−1}·b coordinates, with
    ``m·d(b−1)/2`` trainable numbers (BOFT 2311.06243).

    Attributes:
        factors: m, for which ``2^{m−1}·b`` must divide the layer's input width. With 1 it is OFT.
    """

    factors: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_int(self, "factors", minimum=1)
        if self.factors > 1 and self.block_size % 2:
            raise SpecError(
                f"block_size={self.block_size}: must be even for factors={self.factors}, whose "
                "blocks are joined from two halves."
            )


@dataclass(frozen=True, kw_only=True)
class GOFT(Spec):
    """Rotations of pairs of coordinates, in a tree that joins all of them.

    Stage s turns the pairs ``(i, i + 2^{s−1})`` for the i that are multiples of 2^s, one angle a
    pair, d − 1 in all (GOFT 2404.04316). It can turn any one vector into the first axis; it
    cannot be any rotation.

    Attributes:
        scale: A trainable factor for each coordinate besides, d more numbers; not orthogonal.
    """

    scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_type(self, "scale", bool)


@dataclass(frozen=True, kw_only=True)
class QGOFT(GOFT):
    """GOFT with a free 2×2 matrix for each pair, 4(d − 1) numbers, drawn to orthogonal columns.

    It is as orthogonal as its regulariser makes it: add [`oftfx.penalty`][oftfx.penalty] to the
    loss (qGOFT 2404.04316).

    Attributes:
        weight: λ of the regulariser, the sum of ``⟨column 1, column 2⟩²`` over all pairs.
    """

    weight: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number(self, "weight")


@dataclass(frozen=True, kw_only=True)
class HRA(Spec):
    """A product of reflections: ``x ← x·∏(I − 2 u_i u_iᵀ)``, every u_i learned.

    ``rank·d`` trainable numbers; computed as one map of the few directions the u_i span
    (HRA 2405.17484).

    Attributes:
        rank: How many reflections; even, as they start in equal pairs that cancel.
        weight: λ of the regulariser ``‖I − UUᵀ‖_F²``, which draws the u_i apart:
            [`oftfx.penalty`][oftfx.penalty].
    """

    rank: int = 8
    weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_int(self, "rank", minimum=2)
        if self.rank % 2:
            raise SpecError(
                f"rank={self.rank}: must be even: an odd number of reflections is no rotation and "
                "cannot start at the identity."
            )
        _check_number(self, "weight")


@dataclass(frozen=True, kw_only=True)
class _Subspace(Spec):
    """Fields of the methods that turn a few directions of a layer's input."""

    rank: int = 64
    order: int = 4
    exact: bool = False
    guard: Literal["rescale", "exact"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_int(self, "rank", minimum=2)
        _check_series(self)

    @property
    def block_size(self) -> int:
        """The subspace is one block: its skew matrix is as wide as the rank."""
        return self.rank


@dataclass(frozen=True, kw_only=True)
class PSOFT(_Subspace):
    """Rotation within the top right singular vectors of a layer's weight: PSOFT (2505.11235).

    ``x ← x + (x·Aᵀ)·(T − I)·A`` with A the top-r right singular vectors of W, fixed and saved with
    the adapter, and ``T = diag(1+α)·R·diag(1+β)``: ``r(r−1)/2`` trainable numbers a layer for R
    in SO(r), and 2r for the vectors. Folded, W's principal part ``WAᵀA`` becomes ``WAᵀTᵀA`` and
    the rest of W stays.

    Sites that share a rotation (``share_inputs``) have the singular vectors of their stacked
    weights.

    Attributes:
        rank: r, at most the layer's input width. Beyond the weight's own rank the directions are
            arbitrary.
        relaxed: With the vectors α and β. Without them the map is orthogonal, and all angles and
            norms of W's rows are kept.
        svd: "randomized" (seeded, with oversampling; nothing wider than W or than r + 8 is made)
            or "full".
        order: k of the Cayley–Neumann series, as for OFT.
        exact: The exact Cayley transform instead of the series.
        guard: What to do as ‖Q‖₂ nears 1, as for OFT. Of iid entries ‖Q‖₂ grows with √r.
    """

    relaxed: bool = True
    svd: Literal["randomized", "full"] = "randomized"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_type(self, "relaxed", bool)
        _check_choice(self, "svd", ("randomized", "full"))


@dataclass(frozen=True, kw_only=True)
class LOFT(_Subspace):
    """Rotation within a fixed subspace of a layer's input: LOFT (2605.11872).

    ``x ← x + (x·Pᵀ)·(T − I)·P``; P has r orthonormal rows, is made once and saved with the adapter.

    Sites that share a rotation (``share_inputs``) count as one layer: their weights and their
    gradients are stacked.

    Attributes:
        rank: r, at most the layer's input width.
        support: P. "skew": the planes in which turning changes the loss most, by the skew part of
            WᵀG; "gradient": the top right singular vectors of the loss's gradient G; both need
            ``oftfx.adapt(..., calibration=batches)``. "principal": the top right singular vectors
            of W. "random": orthonormalised Gaussian directions. "coordinate": random coordinates.
        core: "orthogonal": T in SO(r), ``r(r−1)/2`` trainable numbers. "free": any T, r².
        order: k of the Cayley–Neumann series, as for OFT; of orthogonal cores.
        exact: The exact Cayley transform instead of the series.
        guard: What to do as ‖Q‖₂ nears 1, as for OFT.
    """

    support: Literal["skew", "gradient", "principal", "random", "coordinate"] = "skew"
    core: Literal["orthogonal", "free"] = "orthogonal"

    @property
    def calibrated(self) -> bool:
        """Whether the directions depend on the loss."""
        return self.support in ("skew", "gradient")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice(self, "support", ("skew", "gradient", "principal", "random", "coordinate"))
        _check_choice(self, "core", ("orthogonal", "free"))
        if self.support == "skew" and self.rank % 2:
            raise SpecError(
                f"rank={self.rank}: must be even with support='skew', whose directions come in "
                "planes: a skew matrix's singular values are pairs, and half a plane turns nothing."
            )


METHODS: dict[str, type[Spec]] = {
    cls.__name__: cls for cls in (OFT, COFT, BOFT, GOFT, QGOFT, HRA, PSOFT, LOFT)
}


def matches(rule: Target, fqn: str) -> bool:
    """Whether a rule names this site: its fqn, its last components, or a regex over all of it."""
    if isinstance(rule, re.Pattern):
        return rule.fullmatch(fqn) is not None
    return fqn == rule or fqn.endswith("." + rule) or re.fullmatch(rule, fqn) is not None


def _rules(field: str, value: Target | Sequence[Target]) -> tuple[Target, ...]:
    rules = (value,) if isinstance(value, (str, re.Pattern)) else value
    if not isinstance(rules, Sequence):
        raise SpecError(f"{field}={value!r}: must be a name, a regex, or a sequence of them.")
    for rule in rules:
        if not isinstance(rule, (str, re.Pattern)):
            raise SpecError(f"{field} holds {rule!r}: every rule must be a name or a regex.")
        try:
            re.compile(rule)
        except re.error as error:
            raise SpecError(f"{field} holds {rule!r}, which is no valid regex: {error}.") from error
    return tuple(rules)


def _check_int(spec: Spec, field: str, minimum: int) -> None:
    value = getattr(spec, field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(f"{field}={value!r}: must be an integer ≥ {minimum}.")
    if value < minimum:
        raise SpecError(f"{field}={value}: must be ≥ {minimum}.")


def _check_number(spec: Spec, field: str, below: float = math.inf) -> None:
    value = getattr(spec, field)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SpecError(f"{field}={value!r}: must be a number ≥ 0.")
    if not 0 <= value < below:
        most = "finite" if below == math.inf else f"< {below:g}"
        raise SpecError(f"{field}={value!r}: must be {most} and ≥ 0.")


def _check_choice(spec: Spec, field: str, choices: tuple[str, ...]) -> None:
    value = getattr(spec, field)
    if value not in choices:
        raise SpecError(f"{field}={value!r}: must be one of {', '.join(map(repr, choices))}.")


def _check_series(spec: Any) -> None:
    """The fields that say how a skew matrix becomes a rotation."""
    _check_int(spec, "order", minimum=1)
    _check_type(spec, "exact", bool)
    if spec.guard not in (None, "rescale", "exact"):
        raise SpecError(f"guard={spec.guard!r}: must be None, 'rescale' or 'exact'.")


def _check_type(spec: Spec, field: str, kind: type) -> None:
    value = getattr(spec, field)
    if not isinstance(value, kind):
        raise SpecError(f"{field}={value!r}: must be a {kind.__name__}.")


def _nearest(key: str, known: "frozenset[str] | set[str]") -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _to_json(value: Any) -> Any:
    match value:
        case torch.dtype():
            return str(value).removeprefix("torch.")
        case re.Pattern():
            flags = value.flags & ~re.UNICODE
            return {"regex": value.pattern} | ({"flags": flags} if flags else {})
        case Mapping():
            return {key: _to_json(item) for key, item in value.items()}
        case tuple():
            return [_to_json(item) for item in value]
        case _:
            return value


def _from_json(key: str, value: Any) -> Any:
    """One field's value; what is no valid one stays as it is, for the constructor to refuse."""
    match key, value:
        case "dtype", str():
            return getattr(torch, value, value)
        case (("targets" | "exclude"), list()):
            return [_from_json("rule", rule) for rule in value]
        case "rule", {"regex": str(pattern)}:
            try:
                return re.compile(pattern, dict(value).get("flags", 0))
            except (re.error, TypeError, ValueError):
                return pattern
        case "overrides" | "fields", Mapping():
            below = "fields" if key == "overrides" else None
            return {name: _from_json(below or name, item) for name, item in value.items()}
        case _:
            return value
