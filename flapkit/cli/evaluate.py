"""``flapkit evaluate``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flapkit.cli.app import app
from flapkit.cli.options import AsJson, CheckpointArgument, OutputFile, Overrides
from flapkit.cli.output import add_perplexity, add_zero_shot, check_new, percent, print_, set_logging, write_new
from flapkit.cli.progress import progress_listener
from flapkit.system.errors import InputError
from flapkit.system.processes import broadcast_from_rank0

if TYPE_CHECKING:
    from flapkit.run.evaluate import Evaluation


@app.command()
def evaluate(
    checkpoint: CheckpointArgument,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe with the `evaluate` section; by default the checkpoint's own recipe.")
    ] = None,
    overrides: Overrides = None,
    against: Annotated[str | None, typer.Option(metavar="DENSE", help="The dense model to compare with.")] = None,
    as_json: AsJson = False,
    output: OutputFile = None,
) -> None:
    """Measure perplexity and zero-shot tasks of a checkpoint."""
    from flapkit.checkpoint.folder import recipe_of
    from flapkit.recipe.files import find_recipe
    from flapkit.recipe.load import load_recipe
    from flapkit.run.evaluate import evaluate_checkpoint
    from flapkit.system.progress import Progress

    own = recipe_of(Path(checkpoint).expanduser())
    if recipe is None and not own.is_file():
        raise InputError(f"{checkpoint}: has no {own.name}; give a recipe with --recipe")
    if output is not None:
        check_new(output)
    loaded = load_recipe(find_recipe(recipe or own), overrides or [])
    set_logging(quiet=as_json, verbose=False)
    evaluation = evaluate_checkpoint(checkpoint, loaded, against, Progress(progress_listener(quiet=as_json)))
    if output is not None:
        broadcast_from_rank0(partial(write_new, output, evaluation.to_json()))
    sys.stdout.write(evaluation.to_json()) if as_json else print_(_table(evaluation))


def _table(evaluation: Evaluation) -> Table:
    if evaluation.against is not None:
        title = f"{evaluation.checkpoint} against {evaluation.against}"
        table = Table("", "dense", "pruned", "change", title=title)
        add_perplexity(table, evaluation.perplexity)
        add_zero_shot(table, evaluation.zero_shot)
        return table
    table = Table("", "", title=evaluation.checkpoint, show_header=False)
    for name, measured in evaluation.perplexity.items():
        table.add_row(f"perplexity, {name}", f"{measured['model']:.3f}")
        if measured["bits_per_byte"]["model"] is not None:
            table.add_row(f"bits per byte, {name}", f"{measured['bits_per_byte']['model']:.4f}")
    for task, result in evaluation.zero_shot.items():
        for metric, scores in result["metrics"].items():
            table.add_row(f"{task}, {metric}, %", percent(scores["model"]))
    return table
