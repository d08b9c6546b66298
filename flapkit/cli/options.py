"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name of `list recipes`.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in budget.ratio=0.3.")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an output folder that flapkit wrote, or what a stopped run has left."),
]
Force = Annotated[bool, typer.Option("--force", help="Go on though the run takes more memory than there is.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what a stopped run has left.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Measure all statistics anew, and keep none.")]
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A folder, a hub id, or `builtin:tiny-llama`.")
]
OutputFile = Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Write JSON to a new file as well.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
