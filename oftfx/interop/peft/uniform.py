"""PEFT's config has one value of every field, for all layers."""

from collections.abc import Mapping
from typing import Any

from oftfx.errors import CheckpointError


def uniform(specs: Mapping[str, Any], *fields: str) -> Any:
    """One of the specs, once all are known to agree.

    Args:
        specs: By site.
        fields: In which they must not differ; the order of a series that none uses may.

    Raises:
        CheckpointError: They differ, or have a guard, which PEFT does not. Says where.
    """
    one = next(iter(specs.values()))
    for fqn, spec in specs.items():
        for field in fields:
            here, there = getattr(spec, field, None), getattr(one, field, None)
            if here != there and not (field == "order" and one.exact):
                raise CheckpointError(
                    f"{fqn}: {field}={here!r} here, {there!r} elsewhere; PEFT has one for all."
                )
        if getattr(spec, "guard", None):
            raise CheckpointError(f"{fqn}: PEFT has no guard={spec.guard!r}.")
    return one
