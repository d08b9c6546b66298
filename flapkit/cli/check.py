"""``flapkit check``."""

from __future__ import annotations

from rich.table import Table

from flapkit.cli.app import app
from flapkit.cli.options import Force, Overrides, Overwrite, RecipeArgument
from flapkit.cli.output import print_, set_logging


@app.command()
def check(
    recipe: RecipeArgument, overrides: Overrides = None, overwrite: Overwrite = False, force: Force = False
) -> None:
    """Check a recipe, and say what it will do and need, without running it."""
    from flapkit.recipe.files import find_recipe
    from flapkit.recipe.load import load_recipe

    set_logging(quiet=True, verbose=False)
    loaded = load_recipe(find_recipe(recipe), overrides or [])
    # A mistake in the recipe is reported before the rest is imported.
    from flapkit.run.check import check as check_recipe
    from flapkit.run.estimate import memory_limit

    found = check_recipe(loaded, overwrite=overwrite, force=force)
    needs = found.needs
    asked = loaded.recipe
    table = Table("", "", title=f"{loaded.path}: right", show_header=False)
    table.add_row("model", f"{asked.model.path} ({found.target.config.model_type}), {found.params:,} parameters")
    blocks = dict.fromkeys(site.block.name if site.block else site.kind for site in found.target.sites)
    table.add_row("adapter", f"{found.target.adapter.title}: {len(found.target.sites)} sites ({', '.join(blocks)})")
    specs = [("metric", asked.metric), ("searcher", asked.searcher)]
    specs += [("compensator", compensator) for compensator in asked.compensator]
    for kind, spec in specs:
        options = ", ".join(f"{key}={value}" for key, value in spec.options.items())
        table.add_row(kind, f"{spec.name}({options})" if options else spec.name)
    text = asked.calibration
    often = f", {needs.passes} times" if needs.passes > 1 else ""
    table.add_row("calibration", f"{text.dataset}: {text.samples} windows of {text.length} tokens{often}")
    if needs.trained is not None:
        table.add_row("recovery", f"{needs.trained:,} parameters are trained after pruning")
    if found.odd:
        table.add_row("widths", f"{len(found.odd)} MLPs will be of odd width; budget.multiple_of: 32 rounds them")
    table.add_row("budget", f"{found.budget.params:,} of {found.budget.base:,} parameters of {asked.budget.of}")
    layerwise = "no list of layers" if needs.layerwise is None else f"{needs.layerwise / 1e9:,.2f} GB"
    table.add_row("weights", f"{needs.weights / 1e9:,.3f} GB")
    each = f", in each of {found.processes} processes" if found.processes > 1 else ""
    ways = f"{needs.whole / 1e9:,.2f} GB whole, {layerwise} layerwise"
    if asked.trainer.strategy == "model_parallel" and needs.sharded is not None:
        ways += f", {needs.sharded / 1e9:,.2f} GB sharded"
    table.add_row("memory, about", f"{ways}{each}")
    limit = f"{memory_limit(found.processes) / 1e9:,.2f} GB"
    table.add_row(
        "", f"{needs.own / 1e9:,.2f} GB of it the program's own; there are {limit}{' for each' if each else ''}"
    )
    if asked.execution.mode == "layerwise" and any(each.windows is None for each in asked.evaluate.perplexity):
        table.add_row("", "not counted: hidden states of the texts in `evaluate` that have no `windows`")
    table.add_row("disk, about", f"{needs.disk / 1e9:,.3f} GB, and 1 MB for the report")
    table.add_row("compute, about", f"{needs.flops / 1e12:,.2f} TFLOP for calibration")
    table.add_row("output", asked.output)
    if found.left:
        table.add_row("stopped run", f"has left {', '.join(found.left)}; --resume goes on with it")
    print_(table)
