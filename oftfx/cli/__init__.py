"""The ``oftfx`` command: one file for each of its commands."""

import signal
import sys

from oftfx.errors import OftfxError

try:
    import typer
except ModuleNotFoundError:  # the core does not need it
    sys.exit("The oftfx command needs the train extra: pip install 'oftfx[train]'")

from oftfx.cli.console import console
from oftfx.cli.explain import explain
from oftfx.cli.export import export
from oftfx.cli.finetune import finetune
from oftfx.cli.merge import merge
from oftfx.cli.plan import plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root() -> None:
    """Orthogonal finetuning (OFT) for any PyTorch model.

    Train small rotations of a frozen model's layer inputs, then fold them into the weights.

    **oftfx finetune** trains, measures, folds and checks · **oftfx plan** shows what would be
    trained · **oftfx explain** shows what was · **oftfx merge** folds a saved adapter ·
    **oftfx export** writes it for something else.

    Exit codes: 0 done · 1 the merged model disagrees with the trained one · 2 bad input, or
    training diverged, with nothing written · 130 stopped with Ctrl-C · 143 stopped with SIGTERM.
    """


for command in (finetune, plan, explain, merge, export):
    app.command()(command)


def main() -> None:
    """Runs the command; errors raised on purpose become one message and exit code 2."""
    # A job that is told to stop cleans up as it does when interrupted from the keyboard.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app()
    except OftfxError as error:
        from rich.text import Text

        message = Text.assemble(("error: ", "bold red"), str(error))
        console(stderr=True).print(message, soft_wrap=True)
        sys.exit(2)
