"""``flapkit recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flapkit.cli.app import app
from flapkit.cli.options import Overrides, Overwrite, Resume, Verbose
from flapkit.cli.output import print_result, set_logging
from flapkit.cli.progress import progress_listener


@app.command()
def recover(
    checkpoint: Annotated[Path, typer.Argument(help="A pruned checkpoint written by flapkit.")],
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A YAML file, or a name from `flapkit list recipes`; by default the checkpoint's own recipe.",
        ),
    ] = None,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train a pruned checkpoint with the recipe's compensator, and write a new checkpoint."""
    from flapkit.checkpoint.folder import recipe_of
    from flapkit.recipe.files import find_recipe
    from flapkit.recipe.load import load_recipe
    from flapkit.system.progress import Progress

    # The command's time begins here.
    progress = Progress(progress_listener(quiet=quiet))
    loaded = load_recipe(find_recipe(recipe or recipe_of(checkpoint)), overrides or [])
    # A mistake in the recipe is reported before the rest is imported.
    from flapkit.run.recover import recover as recover_checkpoint

    set_logging(quiet=quiet, verbose=verbose)
    result = recover_checkpoint(checkpoint, loaded, overwrite=overwrite, resume=resume, progress=progress)
    if not quiet:
        print_result(str(checkpoint), result)
