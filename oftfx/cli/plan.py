"""``oftfx plan``."""

from typing import Annotated

import typer

from oftfx.cli.console import console
from oftfx.cli.options import takes_spec
from oftfx.spec import Spec


@takes_spec
def plan(
    model: Annotated[str, typer.Argument(help="A model directory, a Hub id or a .gguf file.")],
    spec: Spec,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what would be adapted: layers, parameters, and what is skipped and why.

    Reads the model's configuration only, so a 7B model takes no memory and no download of weights.

    **Examples**

    `oftfx plan ./my-model`

    `oftfx plan org/name --block-size 64 --targets q_proj --targets v_proj --json`
    """
    screen = console(stderr=True)
    import oftfx
    from oftfx.train import models
    from oftfx.train.progress import stage

    with stage(screen, "Planning"):
        found = oftfx.plan(models.load_skeleton(model), spec)
    print(found.to_json() if json else found)
