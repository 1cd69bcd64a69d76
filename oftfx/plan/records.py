"""A plan, and what it is made of."""

import dataclasses
import json
import math
import zlib
from dataclasses import dataclass
from typing import Literal, Self

from oftfx.errors import OftfxError, PlanError
from oftfx.rotations import method_of, output_shapes
from oftfx.sites.matmul import Layout
from oftfx.spec import Spec
from oftfx.spec.rules import exactly
from oftfx.table import plan_table


@dataclass(frozen=True)
class Site:
    """One frozen weight whose matmul gets a rotation on its input.

    Attributes:
        fqn: Name of the weight without a trailing ".weight": for a layer, the layer's own name.
        kind: "functional" folds on the fly; "embedding" rotates what is looked up; all others
            ("linear", "conv1d", "linear4bit", …) rotate the layer's input.
        weight: Full name of the parameter.
        in_features: Width of the input, or of an embedding, which is rotated.
        out_features: Width of the output, or the number of an embedding's rows.
        layout: How the weight is stored, "out_in" or "in_out".
        group: Number of the input tensor; sites that read the same tensor have the same group.
        rotation: fqn of the site that holds this site's parameters: itself, unless shared.
        num_trainable: Trainable numbers this site holds; those of a shared rotation count where
            they are held.
        tied: Whether the weight has other names; merging then gives this site its own copy.
    """

    fqn: str
    kind: str
    weight: str
    in_features: int
    out_features: int
    layout: Layout
    group: int
    rotation: str
    num_trainable: int
    tied: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight as it is stored."""
        shape = (self.out_features, self.in_features)
        return shape if self.layout == "out_in" else shape[::-1]

    @property
    def shared(self) -> bool:
        """Whether the rotation belongs to another site."""
        return self.rotation != self.fqn


@dataclass(frozen=True)
class Group:
    """Sites that read one tensor."""

    index: int
    in_features: int
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Skip:
    """A weight that is left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Copied:
    """A tensor of the base of which a copy is trained as it is (``also_train``)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Which sites a spec adapts in a model.

    Attributes:
        spec: The spec it was made from.
        sites: In the order of the graph.
        skipped: Weights of two or more dimensions that stay as they are.
        capture: "graph" when it was read off a graph; "modules" when off the module tree, which
            knows neither functional matmuls nor shared inputs.
        copied: Tensors that are trained as they are.
    """

    spec: Spec
    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]
    capture: Literal["graph", "modules"] = "graph"
    copied: tuple[Copied, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The sites by the tensor they read."""
        members: dict[int, list[Site]] = {}
        for site in self.sites:
            members.setdefault(site.group, []).append(site)
        return tuple(
            Group(index, group[0].in_features, tuple(site.fqn for site in group))
            for index, group in members.items()
        )

    @property
    def num_trainable(self) -> int:
        """Trainable numbers of all sites, and of the tensors that are trained as they are."""
        whole = sum(math.prod(copied.shape) for copied in self.copied)
        return whole + sum(site.num_trainable for site in self.sites)

    def spec_of(self, site: Site) -> Spec:
        """The spec that holds at a site, overrides applied."""
        return self.spec.at(site.rotation)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Of the tensors that a site holds itself."""
        spec = self.spec_of(site)
        rotation = {} if site.shared else method_of(spec).shapes(spec, site.in_features)
        return {**rotation, **output_shapes(spec, site.out_features)}

    def seed_of(self, fqn: str) -> int:
        """Seed of the initial values that a site holds: the same whatever else is adapted."""
        return zlib.crc32(f"{self.spec.seed}/{fqn}".encode())

    def to_json(self) -> str:
        """The plan as JSON text; a callable ``targets`` becomes the names it chose."""
        spec = self.spec
        if callable(spec.targets):
            names = tuple(exactly(site.fqn) for site in self.sites)
            spec = dataclasses.replace(spec, targets=names)
        return json.dumps(
            {
                "spec": spec.to_json(),
                "capture": self.capture,
                "sites": [dataclasses.asdict(site) for site in self.sites],
                "skipped": [dataclasses.asdict(skip) for skip in self.skipped],
                "copied": [dataclasses.asdict(copied) for copied in self.copied],
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan that [`to_json`][oftfx.Plan.to_json] wrote.

        Raises:
            PlanError: The text is no plan.
            SpecError: Its spec is not valid in this version.
        """
        try:
            data = json.loads(text)
            return cls(
                spec=Spec.from_json(data["spec"]),
                sites=tuple(Site(**site) for site in data["sites"]),
                skipped=tuple(Skip(**skip) for skip in data["skipped"]),
                capture=data["capture"],
                copied=tuple(
                    Copied(copied["name"], tuple(copied["shape"]))
                    for copied in data.get("copied", ())
                ),
            )
        except OftfxError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"this is no plan written by oftfx: {error!r}.") from error

    def __str__(self) -> str:
        return plan_table(self)
