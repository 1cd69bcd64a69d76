"""Where the commands print."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> "Console":
    """A console, with the libraries underneath asked not to draw bars of their own."""
    from rich.console import Console

    screen = Console(stderr=stderr, highlight=False)
    with screen.status("Starting"):  # importing these takes seconds
        import datasets
        from transformers.utils import logging

        import oftfx.train.job  # noqa: F401

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return screen
