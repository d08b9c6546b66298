"""Run a recipe: its stages in a row."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flapkit.checkpoint import check_output, load, load_tokenizer
from flapkit.evaluation.zero_shot import side_by_side
from flapkit.export import export_all
from flapkit.interfaces import recovery_of
from flapkit.plan import Budget
from flapkit.progress import Progress
from flapkit.ranks import is_first
from flapkit.recipe import LoadedRecipe, TrainerSection, dump_recipe
from flapkit.recover import RecoveryRecord, prepare, recover_checkpoint, work_folder
from flapkit.rounding import warn_of_odd
from flapkit.stages.calibrate import calibrate_and_prune_
from flapkit.stages.log import RunLog, open_log
from flapkit.stages.loops import Loops, evaluate
from flapkit.stages.noted import noted_warnings
from flapkit.stages.report import compare_pruned, pair_samples, sample, trace_dense
from flapkit.stages.save import RunRecord, compare, count_params, save_run
from flapkit.stages.target import find_target
from flapkit.stages.text import read_text
from flapkit.stages.zero_shot import ask, load_tasks

FOR_TRAINING = ("accumulate_grad_batches", "gradient_clip_val", "logger")
"""Options of the trainer that pruning has no use for: another value of theirs needs no other pruned model."""

log = logging.getLogger(__name__)


def run(
    recipe: LoadedRecipe, *, overwrite: bool = False, progress: Progress | None = None, cache: Path | None = None
) -> RunRecord | RecoveryRecord:
    """Carry out a recipe, and write its output folder as the last thing.

    Of several processes that share the work, each comes to the same plan, and the first alone writes.

    Where a compensator trains, the pruned model is first written to a folder beside the output, and recovered from
    there. What is there of a run that was stopped is gone on with; the folder is removed at the end.

    Args:
        recipe: what to do.
        overwrite: replace an output folder that flapkit wrote.
        progress: whom the stages tell how far they are.
        cache: folder in which statistics are looked for and kept (``flapkit.cache.cache_folder``); None for none.

    Raises:
        FlapkitError: whatever keeps the run from its end; nothing is written then.
    """
    output, progress = Path(recipe.recipe.output).expanduser(), progress or Progress()
    check_output(output, overwrite=overwrite)
    with noted_warnings() as warnings, open_log(recipe.recipe.trainer.logger, recipe.recipe) as journal:
        if recovery_of(recipe.compensators) is None:
            return _prune(recipe, progress, cache, warnings, journal, overwrite=overwrite)
        prepared = prepare(recipe, progress)
        first = _without_recovery(recipe, work_folder(output) / "pruned")
        if _wrote(first):
            log.info("going on from the pruned model in %s", first.recipe.output)
        else:
            _prune(first, progress, cache, warnings, journal, overwrite=True)
        return recover_checkpoint(Path(first.recipe.output), prepared, warnings, overwrite=overwrite)


def _without_recovery(recipe: LoadedRecipe, output: Path) -> LoadedRecipe:
    """Return the part of a recipe that prunes."""
    asked = recipe.recipe
    pairs = zip(recipe.compensators, asked.compensator, strict=True)
    kept = [(each, spec) for each, spec in pairs if each.corrects or each.recovery() is None]
    defaults = {name: TrainerSection.model_fields[name].default for name in FOR_TRAINING}
    changed = {
        "compensator": tuple(spec for _, spec in kept),
        "trainer": asked.trainer.model_copy(update=defaults),
        "export": (),
        "output": str(output),
    }
    compensators = tuple(each for each, _ in kept)
    return replace(recipe, recipe=asked.model_copy(update=changed), compensators=compensators, exporters=())


def _wrote(recipe: LoadedRecipe) -> bool:
    """Tell whether a recipe's output is there, and was made by the same recipe."""
    written = Path(recipe.recipe.output) / "recipe.yaml"
    return written.is_file() and written.read_text(encoding="utf-8") == dump_recipe(recipe)


def _prune(
    recipe: LoadedRecipe,
    progress: Progress,
    cache: Path | None,
    warnings: Sequence[str],
    journal: RunLog,
    *,
    overwrite: bool,
) -> RunRecord:
    asked = recipe.recipe
    loops = Loops.of(asked.trainer, progress)
    with progress.stage("text"):
        target = find_target(recipe)
        tokenizer = load_tokenizer(asked.model.path, revision=asked.model.revision)
        text = read_text(asked, target, tokenizer)
        tasks = load_tasks(asked.evaluate.zero_shot)
    with progress.stage("load"):
        model = load(asked.model.path, asked.model.dtype, revision=asked.model.revision)
        target.adapter.confirm(model, target.sites)
        dense_params = model.num_parameters()
        budget = Budget.over(target.sites, asked.budget.ratio, asked.budget.of, dense_params, asked.budget.multiple_of)
    before = evaluate(model, text.evaluations, loops, "evaluate dense")
    journal.perplexity("dense", before)
    answers = ask(model, tokenizer, tasks, loops, "zero-shot dense")
    written = sample(model, tokenizer, asked.evaluate.samples, loops, "sample dense")
    trace = trace_dense(model, target.sites, text, asked.report, loops)
    # Machines that do not share a cache would disagree on what is left to measure, and wait for each other.
    cache = cache if asked.trainer.num_nodes == 1 else None
    statistics, pruned = calibrate_and_prune_(model, target.sites, recipe, budget, text, loops, cache)
    warn_of_odd(target.sites, pruned.plan)
    journal.structure(target.sites, pruned.plan)
    errors = compare_pruned(model, trace, pruned, loops)
    journal.errors(target.sites, errors)
    after = evaluate(model, text.evaluations, loops, "evaluate pruned")
    journal.perplexity("pruned", after)
    pruned_answers = ask(model, tokenizer, tasks, loops, "zero-shot pruned")
    rewritten = sample(model, tokenizer, asked.evaluate.samples, loops, "sample pruned")
    record = RunRecord(
        recipe,
        target,
        tokenizer,
        text,
        budget,
        statistics,
        pruned,
        count_params(target, pruned.plan, dense_params, model.num_parameters()),
        compare(before, after),
        progress.seconds,
        warnings,
        zero_shot=side_by_side(answers, pruned_answers),
        errors=errors,
        error_tokens=trace.tokens if trace else 0,
        samples=pair_samples(asked.evaluate.samples, written, rewritten),
    )
    if not is_first():
        return record
    journal.totals(record.params, record.seconds)
    with progress.stage("save"):
        save_run(record, model, journal.files(), overwrite=overwrite)
    if not recipe.exporters:
        return record
    with progress.stage("export", len(recipe.exporters), "exports") as stage:
        return replace(record, exports=export_all(record.output, recipe.exporters, recipe.registry, stage))
