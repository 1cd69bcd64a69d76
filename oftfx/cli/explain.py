"""``oftfx explain``."""

from pathlib import Path
from typing import Annotated

import typer

from oftfx.cli.console import console
from oftfx.cli.options import Dtype


def explain(
    base: Annotated[
        str,
        typer.Argument(help="The model the adapter was trained on: a directory, Hub id or .gguf."),
    ],
    adapter: Annotated[Path, typer.Argument(help="An adapter directory.")],
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show how a saved adapter is run, layer by layer, and how far it has turned each.

    **Example**

    `oftfx explain ./my-model tuned/adapter`
    """
    import oftfx
    from oftfx.train import models
    from oftfx.train.progress import stage

    with stage(console(stderr=True), "Loading the model"):
        model, _ = models.load(base, dtype)
        oftfx.load(model, adapter)
    found = oftfx.explain(model)
    print(found.to_json() if json else found)
