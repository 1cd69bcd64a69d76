"""``oftfx explain``."""

from pathlib import Path
from typing import Annotated

import typer

from oftfx.cli.console import console
from oftfx.cli.options import Dtype
from oftfx.cli.saved import Adapter, Base


def explain(
    base: Base,
    adapter: Adapter,
    dtype: Dtype = "auto",
    html: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Also write it to this file: one page with a heat map of all layers and the graph "
            "of one, before and after.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show how a saved adapter is run, layer by layer, and how far it has turned each.

    **Examples**

    `oftfx explain ./my-model tuned/adapter`

    `oftfx explain ./my-model tuned/adapter --html explained.html`
    """
    screen = console(stderr=True)
    import oftfx
    from oftfx.train import models
    from oftfx.train.progress import stage

    with stage(screen, "Loading the model"):
        model, _ = models.load(base, dtype)
        oftfx.load(model, adapter)
    with stage(screen, "Explaining"):
        found = oftfx.explain(model, layer="auto" if html else None)
        if html:
            try:
                found.save_html(html)
            except OSError as error:
                raise oftfx.OftfxError(f"{html} cannot be written: {error}.") from error
    print(found.to_json() if json else found)
