"""Options that several commands take, each said once."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from oftfx.errors import SpecError
from oftfx.spec import METHODS, Spec
from oftfx.spec.rules import ALL_LINEAR

ROTATIONS, TRAINING, MEASURING, OUTPUT = "Rotations", "Training", "Measuring", "Output"

Out = Annotated[
    Path,
    typer.Option(
        help="Directory to write. It appears when everything succeeded.", rich_help_panel=OUTPUT
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Replace an earlier result of oftfx at --out.", rich_help_panel=OUTPUT
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the frozen weights; auto keeps the stored one."),
]

ShardSize = Annotated[
    str | None,
    typer.Option(
        help="Split the merged model's weights into files of at most this size, such as 5GB.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]


def _turning(help: str, *flags: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=ROTATIONS)


def rotations(
    method: Annotated[
        Literal["oft", "coft", "boft", "goft", "qgoft", "hra", "psoft", "loft"],
        _turning(
            "How inputs are rotated: in blocks (oft), in blocks that stay near the identity "
            "(coft) or reach ever farther (boft), in a tree of pairs (goft; qgoft with free "
            "pairs), by reflections (hra), or among a few directions of the input: the weight's "
            "main ones (psoft) or those that matter most to the loss (loft).",
        ),
    ] = "oft",
    block_size: Annotated[
        int | None,
        _turning(
            "oft, coft, boft: width of a rotation block; must divide every adapted layer's input "
            "width. Larger turns more, and trains more parameters. 32 unless given.",
        ),
    ] = None,
    order: Annotated[
        int | None,
        _turning(
            "All but goft, qgoft and hra: order k of the Cayley–Neumann series; even orders stay "
            "closer to orthogonal. 4 unless given.",
        ),
    ] = None,
    exact: Annotated[
        bool,
        _turning(
            "All but goft, qgoft and hra: the exact Cayley transform instead of the series: "
            "slower, always orthogonal.",
            "--exact",
        ),
    ] = False,
    guard: Annotated[
        Literal["none", "rescale", "exact"],
        _turning(
            "All but goft, qgoft and hra: what happens as ‖Q‖ nears 1, beyond which the series "
            "means nothing: only warn, or from 0.9 on shrink Q back, or use the exact transform "
            "there.",
        ),
    ] = "none",
    unit_rate: Annotated[
        bool,
        _turning(
            "All but goft, qgoft and hra: --lr is the angle in radians that a step turns at most, "
            "so that one value suits every block size and rank.",
            "--unit-rate",
        ),
    ] = False,
    share_blocks: Annotated[
        bool,
        _turning(
            "oft, coft, boft: one block's parameters for all blocks of a layer.",
            "--share-blocks",
        ),
    ] = False,
    dropout: Annotated[
        float | None,
        _turning(
            "oft, coft, boft: how likely a block rests in a training step. 0 unless given.",
        ),
    ] = None,
    eps: Annotated[
        float | None,
        _turning(
            "coft: ‖Q‖ that a layer may reach. 1 unless given.",
        ),
    ] = None,
    magnitude: Annotated[
        bool,
        _turning(
            "oft, coft, boft: a trainable factor for each output of a layer besides.",
            "--magnitude",
        ),
    ] = False,
    factors: Annotated[
        int | None,
        _turning(
            "boft: how many block rotations are multiplied. 2 unless given.",
        ),
    ] = None,
    scale: Annotated[
        bool,
        _turning(
            "goft, qgoft: a factor for each coordinate besides.",
            "--scale",
        ),
    ] = False,
    rank: Annotated[
        int | None,
        _turning(
            "hra: how many reflections, an even number; 8 unless given. psoft, loft: how many "
            "directions; 64 unless given.",
        ),
    ] = None,
    weight: Annotated[
        float | None,
        _turning(
            "qgoft, hra: weight of the regulariser in the loss. 0.01 and 0 unless given.",
        ),
    ] = None,
    support: Annotated[
        Literal["skew", "gradient", "principal", "random", "coordinate"] | None,
        _turning(
            "loft: which directions. The first two follow the loss's gradient on a few blocks of "
            "the training text. skew unless given.",
        ),
    ] = None,
    core: Annotated[
        Literal["orthogonal", "free"] | None,
        _turning(
            "loft: whether the directions are rotated or mapped freely. orthogonal unless given.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        _turning(
            "psoft: rotations alone, without the two vectors of scales.",
            "--strict",
        ),
    ] = False,
    targets: Annotated[
        list[str] | None,
        _turning(
            "A layer name such as q_proj, or a regex over the whole name; repeat it for more. "
            "Without it, or with all-linear alone, every linear layer but the output head.",
        ),
    ] = None,
    also_train: Annotated[
        list[str] | None,
        _turning(
            "A layer or tensor that is trained as it is besides, such as norm or bias, or a regex; "
            "repeat it for more.",
        ),
    ] = None,
    share_inputs: Annotated[
        bool,
        _turning(
            "One rotation for all layers that read the same tensor, as q, k and v do.",
            "--share-inputs",
        ),
    ] = False,
) -> Spec:
    """The spec of a method from its options; None, False and "none" are those not given.

    Raises:
        SpecError: An option belongs to another method, or its value is out of range.
    """
    given = locals().copy()
    if targets == [ALL_LINEAR]:
        given["targets"] = ALL_LINEAR
    cls = METHODS[given.pop("method").upper()]
    known = {field.name for field in dataclasses.fields(cls)}
    fields = {
        key: value
        for key, value in given.items()
        if not (value is None or value is False or value == "none")
    }
    for key in fields:
        if _OPPOSITES.get(key, key) not in known:
            option = key.replace("_", "-")
            raise SpecError(f"--{option} is no option of --method {method}.")
    for option in fields.keys() & _OPPOSITES.keys():
        fields[_OPPOSITES[option]] = not fields.pop(option)
    return cls(**fields)


_OPPOSITES = {"strict": "relaxed"}
"""Flags that switch a field off."""


def takes_spec(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes a ``spec`` the options of [`rotations`] in its place."""
    own = inspect.signature(command).parameters.values()
    options = inspect.signature(rotations).parameters
    parameters = [*(p for p in own if p.name != "spec"), *options.values()]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        spec = rotations(**{name: given.pop(name) for name in options})
        command(**given, spec=spec)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
