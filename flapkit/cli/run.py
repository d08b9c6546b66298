"""``flapkit run``."""

from __future__ import annotations

from typing import Annotated

import typer

from flapkit.cli.app import app
from flapkit.cli.options import NoCache, Overrides, Overwrite, RecipeArgument
from flapkit.cli.output import print_result, set_logging
from flapkit.cli.progress import progress_listener


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    no_cache: NoCache = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every library's messages.")] = False,
) -> None:
    """Prune a model as a recipe says."""
    from flapkit.cache import cache_folder
    from flapkit.progress import Progress
    from flapkit.recipe import find_recipe, load_recipe
    from flapkit.run import run as run_recipe

    loaded = load_recipe(find_recipe(recipe), overrides or [])
    set_logging(quiet=quiet, verbose=verbose)
    progress = Progress(progress_listener(quiet=quiet))
    result = run_recipe(loaded, overwrite=overwrite, progress=progress, cache=None if no_cache else cache_folder())
    if not quiet:
        print_result(loaded.recipe.model.path, result)
