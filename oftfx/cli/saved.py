"""A saved adapter on its base, as the commands that turn it into something else take it."""

from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from oftfx import MergeReport
    from oftfx.train.models import LanguageModel

Base = Annotated[
    str, typer.Argument(help="The model the adapter was trained on: a directory, Hub id or .gguf.")
]
Adapter = Annotated[Path, typer.Argument(help="An adapter directory.")]


@contextmanager
def opened(
    base: str, adapter: Path, out: Path, dtype: str, force: bool, screen: "Console"
) -> Iterator[tuple["LanguageModel", Path]]:
    """Yields the adapted model with its tokenizer, and a directory that becomes ``out``."""
    import oftfx
    from oftfx.train import models
    from oftfx.train.output import MARKER, staged
    from oftfx.train.progress import stage

    with staged(out, force) as fresh:
        with stage(screen, "Loading the model"):
            loaded = models.load(base, dtype)
            oftfx.load(loaded.model, adapter)
        yield loaded, fresh
        record = {"version": oftfx.__version__, "base": base, "adapter": str(adapter)}
        (fresh / MARKER).write_text(dumps(record, indent=1) + "\n")


def tell_cost(report: "MergeReport", screen: "Console") -> None:
    """Says what folding cost the worst layer."""
    worst = max(report.sites, key=lambda site: site.output_error)
    screen.print(
        f"{len(report.sites)} rotations folded; a layer's output changed by at most "
        f"{worst.output_error:.1e} of itself ({worst.fqn})"
    )
