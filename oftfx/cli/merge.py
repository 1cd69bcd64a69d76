"""``oftfx merge``."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from oftfx.cli.console import console
from oftfx.cli.options import Dtype, Force, Out


def merge(
    base: Annotated[
        str,
        typer.Argument(help="The model the adapter was trained on: a directory, Hub id or .gguf."),
    ],
    adapter: Annotated[Path, typer.Argument(help="An adapter directory.")],
    out: Out,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Fold a saved adapter into its base: an ordinary model directory that needs no oftfx.

    **Example**

    `oftfx merge ./my-model tuned/adapter --out merged`
    """
    import oftfx
    from oftfx.train import models, publish
    from oftfx.train.output import MARKER, staged
    from oftfx.train.progress import stage

    screen = console()
    with staged(out, force) as fresh:
        with stage(screen, "Loading the model"):
            model, tokenizer = models.load(base, dtype)
            oftfx.load(model, adapter)
        with stage(screen, "Folding"):
            report = publish.publish(model, tokenizer, fresh)
            record = {"version": oftfx.__version__, "base": base, "adapter": str(adapter)}
            (fresh / MARKER).write_text(dumps(record, indent=1) + "\n")
    worst = max(report.sites, key=lambda site: site.output_error)
    screen.print(
        f"{len(report.sites)} rotations folded; a layer's output changed by at most "
        f"{worst.output_error:.1e} of itself ({worst.fqn})"
    )
    screen.print(f"merged model  {out}")
