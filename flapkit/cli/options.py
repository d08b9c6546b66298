"""Arguments and options that several commands share."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from flapkit.cli.output import set_logging


def _show_all(verbose: bool) -> bool:
    """Show all messages from now on, or not; mistakes of plugins are found before the command sets its logging."""
    if verbose:
        set_logging(quiet=False, verbose=True)
    else:
        logging.getLogger("flapkit").setLevel(logging.INFO)
    return verbose


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name from `flapkit list recipes`.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, for example budget.ratio=0.3.")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an output written by flapkit, and the work of an interrupted run."),
]
Force = Annotated[bool, typer.Option("--force", help="Run even if the memory estimate exceeds the available memory.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither read nor write the cache of statistics and tokens.")]
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A folder, a hub id, or `builtin:tiny-llama`.")
]
OutputFile = Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Also write JSON to a new file.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_show_all,
        help="Print the messages of all libraries, and the traceback of an error.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
