"""Where the commands print."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> "Console":
    """A console, with the libraries underneath asked not to draw bars of their own."""
    import datasets
    from rich.console import Console
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return Console(stderr=stderr, highlight=False)
