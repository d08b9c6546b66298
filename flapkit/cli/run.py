"""``flapkit run``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from flapkit.cli.app import app
from flapkit.cli.options import NoCache, Overrides, Overwrite, RecipeArgument
from flapkit.cli.output import add_perplexity, add_zero_shot, print_, set_logging
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
    if quiet:
        return
    dense, pruned = result.params["dense"], result.params["pruned"]
    table = Table("", "dense", "pruned", "change", title=f"{loaded.recipe.model.path} → {result.output}")
    table.add_row("parameters", f"{dense:,}", f"{pruned:,}", f"{pruned / dense - 1:+.1%}")
    blocks, removed = result.params["blocks"], result.params["removed"]
    table.add_row("block parameters", f"{blocks:,}", f"{blocks - removed:,}", f"{-removed / blocks:+.1%}")
    add_perplexity(table, result.perplexity)
    add_zero_shot(table, result.zero_shot)
    print_(table)
    for name, agreed in result.exports.items():
        print_(f"exports/{name}: {agreed}")
    print_("seconds: " + ", ".join(f"{stage} {time:.1f}" for stage, time in result.seconds.items()))
