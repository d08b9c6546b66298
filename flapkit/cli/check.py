"""``flapkit check``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from flapkit.cli.app import app
from flapkit.cli.options import Force, Overrides, Overwrite, RecipeArgument
from flapkit.cli.output import print_, set_logging
from flapkit.system.progress import duration
from flapkit.system.sizes import counted

if TYPE_CHECKING:
    from flapkit.run.check import Checked
    from flapkit.run.estimate import Estimate
    from flapkit.run.presets import Better


@app.command()
def check(
    recipe: RecipeArgument, overrides: Overrides = None, overwrite: Overwrite = False, force: Force = False
) -> None:
    """Check a recipe and estimate the memory, disk and compute that it needs, without running it."""
    from flapkit.recipe.files import find_recipe
    from flapkit.recipe.load import load_recipe

    set_logging(quiet=True, verbose=False)
    loaded = load_recipe(find_recipe(recipe), overrides or [])
    # A mistake in the recipe is reported before the rest is imported.
    from flapkit.checkpoint.serving import VLLM
    from flapkit.run.check import check as check_recipe
    from flapkit.run.estimate import memory_limit
    from flapkit.run.ledger import label_of, show

    outcome = check_recipe(loaded, overwrite=overwrite, force=force)
    needs, target, settings = outcome.needs, outcome.target, loaded.recipe
    table = Table("", "", title=f"{loaded.path} is valid", show_header=False)
    table.add_row("model", f"{settings.model.source} ({target.config.model_type}), {outcome.params:,} parameters")
    blocks = dict.fromkeys(site.block.name if site.block else site.kind for site in target.sites)
    table.add_row("adapter", f"{target.adapter.title}: {counted(len(target.sites), 'site')} ({', '.join(blocks)})")
    if target.why_unit:
        table.add_row("unit: auto", target.why_unit)
    specs = [("metric", settings.metric), ("searcher", settings.searcher)]
    specs += [("compensator", compensator) for compensator in settings.compensator]
    for kind, spec in specs:
        options = ", ".join(f"{key}={value}" for key, value in spec.options.items())
        table.add_row(kind, f"{spec.name}({options})" if options else spec.name)
    text = settings.calibration
    passes = f", {needs.passes} passes" if needs.passes > 1 else ""
    table.add_row(
        "calibration",
        f"{text.text.title}: {counted(text.samples, 'window')} of {counted(text.length, 'token')}{passes}",
    )
    if needs.trained is not None:
        table.add_row("recovery", f"{needs.trained:,} parameters are trained after pruning")
    if outcome.unaligned:
        table.add_row(
            "widths",
            f"the width of {counted(len(outcome.unaligned), 'MLP')} is not a multiple of 32; "
            "budget.multiple_of: 32 rounds it",
        )
    budget = outcome.budget
    if budget.asked:
        table.add_row(
            "budget", f"{budget.asked}: remove {budget.cost.say(budget.amount)} of {budget.cost.say(budget.base)}"
        )
    else:
        table.add_row("budget", f"remove {budget.amount:,} of {budget.base:,} parameters of {budget.of}")
    for row in outcome.costs:
        before, after = show(row.measure, row.dense), show(row.measure, row.pruned)
        most = f", at most {show(row.measure, row.asked)}" if row.asked is not None else ""
        table.add_row("", f"{label_of(row.measure, row.detail)}: {before}, pruned about {after}{most}")
    layerwise = "unknown" if needs.layerwise is None else f"{needs.layerwise / 1e9:,.2f} GB"
    table.add_row("weights", f"{needs.weights / 1e9:,.3f} GB; {outcome.dtypes.summary}")
    memory = f"{needs.whole / 1e9:,.2f} GB whole, {layerwise} layerwise"
    if settings.trainer.strategy == "model_parallel" and needs.sharded is not None:
        memory += f", {needs.sharded / 1e9:,.2f} GB sharded"
    several = outcome.processes > 1
    table.add_row("memory, about", memory + (f", in each of {outcome.processes} processes" if several else ""))
    available = f"{memory_limit(outcome.processes) / 1e9:,.2f} GB available{' to each' if several else ''}"
    table.add_row("", f"including {needs.own / 1e9:,.2f} GB for Python, libraries and windows of text; {available}")
    for dataset in needs.unread:
        table.add_row("", f"not included: the text of {dataset} while it is read")
    if settings.execution.mode == "layerwise" and any(text.windows is None for text in settings.evaluate.perplexity):
        table.add_row("", "not included: hidden states of texts in `evaluate` without `windows`")
    table.add_row("disk, about", f"{needs.disk / 1e9:,.3f} GB, and 1 MB for the report")
    table.add_row("compute, about", _compute(needs, outcome.pace))
    _add_presets(table, outcome)
    table.add_row("output", settings.output)
    served = f"no: {outcome.unserved}" if outcome.unserved else f"yes, as far as the configuration shows (vLLM {VLLM})"
    table.add_row("served by vLLM", served)
    for warning in outcome.warnings:
        table.add_row("warning", warning)
    if outcome.left:
        table.add_row("interrupted run", f"finished {', '.join(outcome.left)}; --resume continues from it")
    print_(table)


def _add_presets(table: Table, outcome: Checked) -> None:
    """Say which preset the recipe is, and what a better one would cost."""
    preset = outcome.preset
    differs = f"none; the nearest is {preset.name}, with another {', '.join(preset.differs)}"
    table.add_row("preset", differs if preset.differs else preset.name)
    for better in outcome.better:
        table.add_row(f"better: {better.name}", _cost(better, outcome.pace))
        changes = [_quoted(f"{key}={_flow(value)}") for key, value in better.settings.items()]
        table.add_row("", " ".join(f"--set {change}" for change in changes))


def _cost(better: Better, pace: float) -> str:
    if better.needs is None:
        return f"not with this recipe: {better.obstacle}"
    needs = better.needs
    passes = f"{counted(needs.passes, 'pass', 'passes')} over the calibration text"
    search = f", {better.search}" if better.search else ""
    return f"{passes}{search}; {needs.whole / 1e9:,.2f} GB whole, {_compute(needs, pace)}"


def _compute(needs: Estimate, pace: float) -> str:
    """Say what calibration computes, and the search if it runs the model, and how long that takes at a pace."""
    calibration = f"{needs.flops / 1e12:,.2f} TFLOP for calibration"
    if needs.search_flops is None:
        return f"{calibration}, unknown for the trials"
    search = f", {needs.search_flops / 1e12:,.2f} TFLOP for the search" if needs.search_flops else ""
    seconds = (needs.flops + needs.search_flops) / pace
    return f"{calibration}{search}: {'less than a minute' if seconds < 60 else f'about {duration(seconds)}'} here"


def _flow(value: Any) -> str:
    """Write a value as YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(entry)}" for key, entry in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    return f"'{text}'" if " " in text else text
