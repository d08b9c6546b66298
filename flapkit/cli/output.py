"""How commands print, and which messages are shown."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from rich.console import Console
from rich.table import Table


def print_(what: Any) -> None:
    """Print a table or a line; where nobody looks at a terminal, plain lines that are not broken."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=200)
        if isinstance(what, Table):
            what.box = None
            what.title_justify = "left"
    console.print(what, markup=False) if isinstance(what, str) else console.print(what)


def set_logging(*, quiet: bool, verbose: bool) -> None:
    """Show flapkit's own messages, or none, or every library's."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("flapkit").setLevel(logging.ERROR if quiet else logging.INFO)
    if verbose:
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # Lightning sets the level of its own root when it is imported; these are below it.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
