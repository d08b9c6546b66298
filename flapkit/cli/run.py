"""``flapkit run``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from flapkit.cli.app import app
from flapkit.cli.options import Force, NoCache, Overrides, Overwrite, RecipeArgument, Resume, Verbose
from flapkit.cli.output import print_, print_result, set_logging
from flapkit.cli.progress import json_lines, progress_listener
from flapkit.system.progress import Listener

if TYPE_CHECKING:
    from flapkit.run.recover import RecoveryRecord
    from flapkit.run.run_record import RunRecord


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    no_cache: NoCache = False,
    force: Force = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    verbose: Verbose = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON objects, one per line.")] = False,
) -> None:
    """Run a recipe: prune a model, repair, evaluate and save it."""
    from flapkit.recipe.files import find_recipe
    from flapkit.recipe.load import load_recipe
    from flapkit.system.progress import Progress

    def work(listener: Listener) -> tuple[str, RunRecord | RecoveryRecord]:
        # The command's time begins here.
        progress = Progress(listener)
        loaded = load_recipe(find_recipe(recipe), overrides or [])
        # A mistake in the recipe is reported before the rest is imported.
        from flapkit.run.pipeline import run as run_recipe
        from flapkit.system.paths import cache_folder

        set_logging(quiet=quiet, verbose=verbose)
        cache = None if no_cache else cache_folder()
        return loaded.recipe.model.source, run_recipe(
            loaded, overwrite=overwrite, resume=resume, force=force, progress=progress, cache=cache
        )

    if as_json:
        with json_lines(sys.stdout) as lines:
            _, record = work(lines)
            lines.write("result", output=record.output, **record.result())
        return
    model, record = work(progress_listener(quiet=quiet))
    if not quiet:
        print_result(model, record)
        print_(f"report: {record.output / 'report.html'}")
        _print_next_steps(model, record)


def _print_next_steps(model: str, record: RunRecord | RecoveryRecord) -> None:
    from flapkit.run.run_record import RunRecord

    if isinstance(record, RunRecord):
        for purpose, command in record.next_steps(str(record.output), model).items():
            print_(f"{purpose}: {command}")
