"""``oftfx merge``."""

from oftfx.cli.console import console
from oftfx.cli.options import Dtype, Force, Out
from oftfx.cli.saved import Adapter, Base, opened, tell_cost


def merge(
    base: Base, adapter: Adapter, out: Out, dtype: Dtype = "auto", force: Force = False
) -> None:
    """Fold a saved adapter into its base: an ordinary model directory that needs no oftfx.

    **Example**

    `oftfx merge ./my-model tuned/adapter --out merged`
    """
    screen = console()
    from oftfx.train.progress import stage
    from oftfx.train.publish import publish

    with (
        opened(base, adapter, out, dtype, force, screen) as (loaded, fresh),
        stage(screen, "Folding"),
    ):
        report = publish(*loaded, fresh, dtype)
    tell_cost(report, screen)
    screen.print(f"merged model  {out}")
