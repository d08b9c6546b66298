"""Run a recipe: the sequence of its stages."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flapkit.checkpoint.export import export_all
from flapkit.checkpoint.folder import check_output
from flapkit.checkpoint.load import load_tokenizer
from flapkit.evaluation.block_table import find_times
from flapkit.evaluation.protocol import MeasuredPerplexity
from flapkit.evaluation.scores import TaskScores
from flapkit.evaluation.zero_shot import by_task
from flapkit.execution.cache import TokenCache
from flapkit.execution.executor import CalibrationText, Executor, prune_
from flapkit.execution.resume import ResumeStore, make_without_store
from flapkit.execution.runtime import Runtime
from flapkit.model.empty import skeleton
from flapkit.model.positions import check_lengths
from flapkit.pruning.budgets import CostedBudget
from flapkit.pruning.components import TrainedSearcher, recovery_of
from flapkit.pruning.rounding import warn_of_unaligned_widths
from flapkit.recipe.dump import dump_recipe
from flapkit.recipe.load import LoadedRecipe
from flapkit.recipe.schema import Recipe, TrainerSection
from flapkit.run.budget import open_budget, refuse_unmet
from flapkit.run.captured import capture_warnings
from flapkit.run.dtypes import DTypes, choose_dtypes
from flapkit.run.estimate import refuse_too_large
from flapkit.run.executors import open_executor, open_runtime
from flapkit.run.journal import RunLog, open_log
from flapkit.run.lengths import run_lengths
from flapkit.run.recover import RecoveryRecord, prepare, recover_checkpoint
from flapkit.run.run_record import RunRecord, count_params, put_texts_beside, rewrite_result, save_run
from flapkit.run.samples import compare_pruned, make_trace, pair_samples, sample, trace_dense
from flapkit.run.target import Target, find_target
from flapkit.run.tasks import evaluate_tasks, load_tasks
from flapkit.run.text import RunText, check_text, read_text, render_prompts
from flapkit.system.processes import broadcast_from_rank0, is_rank_zero, lost_processes
from flapkit.system.progress import Progress
from flapkit.system.workdir import WorkDir, check_space, open_workdir
from flapkit.text.windows import tokens_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flapkit.evaluation.harness import Harness

FOR_TRAINING = ("accumulate_grad_batches", "gradient_clip_val", "logger")
"""Options of the trainer that do not affect pruning."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunContext:
    """The parts of a run that do not depend on its recipe.

    Args:
        progress: receives the progress of the stages.
        cache: folder of cached statistics; None for no cache.
        warnings: flapkit's warnings so far.
        journal: the run's loggers.
        work: the output's work folder.
    """

    progress: Progress
    cache: Path | None
    warnings: Sequence[str]
    journal: RunLog
    work: WorkDir


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and everything to prune and measure it, before and after it is pruned in place.

    Args:
        recipe: the recipe.
        target: the model's sites.
        tokenizer: the model's tokenizer.
        text: the run's text, as tokens.
        tasks: zero-shot tasks; None for none.
        executor: holds and runs the model.
        dense_params: its number of parameters before pruning.
        budget: how much to remove, and what the model costs.
        dtypes: the dtypes of the computation and of the written checkpoint.
    """

    recipe: LoadedRecipe
    target: Target
    tokenizer: PreTrainedTokenizerBase
    text: RunText
    tasks: Harness | None
    executor: Executor
    dense_params: int
    budget: CostedBudget
    dtypes: DTypes


@dataclass(frozen=True, slots=True)
class Measurements:
    """The measurements of a model.

    Args:
        perplexity: name of the text -> perplexity.
        answers: zero-shot task -> scores.
        samples: its continuation of each prompt.
    """

    perplexity: Mapping[str, MeasuredPerplexity]
    answers: Mapping[str, TaskScores]
    samples: Sequence[str]


def run(
    recipe: LoadedRecipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> RunRecord | RecoveryRecord:
    """Run a recipe, and write its output folder at the end.

    With several processes, all find the same plan, and only the first writes.

    During the run, finished work is stored in the output's work folder (``flapkit.system.workdir``). If a compensator
    trains, the pruned model is first written there, and recovered from there.

    Args:
        recipe: the recipe.
        overwrite: replace an output folder that flapkit wrote; without ``resume``, also an interrupted run's work.
        resume: resume an interrupted run of the same recipe.
        force: run even if the estimate exceeds the available memory.
        progress: receives the progress of the stages.
        cache: folder of cached statistics (``flapkit.system.paths.cache_folder``); None for no cache.

    Raises:
        FlapkitError: the run fails; no output is written.
    """
    output, settings = recipe.output, recipe.recipe
    target = find_target(recipe)
    check_text(settings)
    refuse_unmet(recipe, target)
    if not force:
        refuse_too_large(recipe, target)
    check = partial(check_output, output, overwrite=overwrite)
    with (
        open_workdir(output, _identity(recipe), check=check, resume=resume, overwrite=overwrite) as work,
        capture_warnings() as warnings,
        open_log(settings.trainer.logger, settings) as journal,
        lost_processes(),
    ):
        if resume and not work.records():
            log.info("there is no interrupted run to resume; starting from the beginning")
        context = RunContext(progress or Progress(), cache, warnings, journal, work)
        if recovery_of(recipe.compensators) is None:
            return _prune(recipe, target, context, overwrite=overwrite)
        prepared = prepare(recipe, target, context.progress, cache=cache)
        prepared.runtime.init_processes()
        first = _without_recovery(recipe, work.path("pruned"))
        if broadcast_from_rank0(work.path("pruned").is_dir):
            log.info("resuming from the pruned model in %s", first.recipe.output)
        else:
            _prune(first, target, context, overwrite=False)
        return recover_checkpoint(first.output, prepared, warnings, work, overwrite=overwrite)


def _identity(recipe: LoadedRecipe) -> dict[str, Any]:
    """Return the part of a recipe that an interrupted run must share to be resumed: everything up to pruning."""
    settings: dict[str, Any] = yaml.safe_load(dump_recipe(_without_recovery(recipe, Path())))
    del settings["output"], settings["export"]
    return settings


def _without_recovery(recipe: LoadedRecipe, output: Path) -> LoadedRecipe:
    """Return a recipe without its recovery and exports."""
    settings = recipe.recipe
    pruning = [named for named in recipe.named_compensators if named[0].corrects or named[0].recovery() is None]
    defaults = {name: TrainerSection.model_fields[name].default for name in FOR_TRAINING}
    # A searcher that trains uses them as well.
    trains = isinstance(recipe.method.searcher, TrainedSearcher)
    changed = {
        "trainer": settings.trainer if trains else settings.trainer.model_copy(update=defaults),
        "export": (),
        "output": str(output),
    }
    first = recipe.with_compensators(pruning)
    return replace(first, recipe=first.recipe.model_copy(update=changed), exporters=())


def _prune(recipe: LoadedRecipe, target: Target, context: RunContext, *, overwrite: bool) -> RunRecord:
    """Prune the recipe's model, measure it before and after, and write the recipe's output."""
    settings, runtime = recipe.recipe, open_runtime(recipe.recipe.trainer, context.progress)
    # Machines without a shared disk would disagree on what is finished, and wait for each other forever.
    store = ResumeStore(context.work) if settings.trainer.num_nodes == 1 else None
    subject = _read(recipe, target, runtime, context, store)
    executor, sites = subject.executor, subject.target.sites
    dense = _measure_dense(subject, runtime, store)
    context.journal.perplexity("dense", dense.perplexity)
    trace = make_trace(sites, subject.text, settings.report, executor.model.dtype)
    trace_dense(executor, trace, context.progress)
    pruned = prune_(executor, recipe.method, subject.budget.budget, sequential=settings.calibration.sequential)
    warn_of_unaligned_widths(sites, pruned.plan)
    context.journal.structure(sites, pruned.plan)
    errors = compare_pruned(executor, trace, pruned, context.progress)
    context.journal.errors(sites, errors)
    after = _measure(subject, runtime, "pruned")
    context.journal.perplexity("pruned", after.perplexity)
    record = RunRecord(
        recipe=recipe,
        target=subject.target,
        tokenizer=subject.tokenizer,
        text=subject.text,
        budget=subject.budget,
        pruned=pruned,
        params=count_params(subject.target, pruned.plan, subject.dense_params, executor.model.num_parameters()),
        perplexity=put_texts_beside({"dense": dense.perplexity, "pruned": after.perplexity}),
        seconds=context.progress.seconds,
        warnings=context.warnings,
        dtypes=subject.dtypes,
        zero_shot=by_task({"dense": dense.answers, "pruned": after.answers}),
        errors=errors,
        error_tokens=trace.tokens if trace else 0,
        samples=pair_samples(settings.evaluate.samples, dense.samples, after.samples),
    )
    return _write(record, executor, context, overwrite=overwrite)


def _read(
    recipe: LoadedRecipe, target: Target, runtime: Runtime, context: RunContext, store: ResumeStore | None
) -> Subject:
    """Read all text, then load the model, or open it to run layer by layer."""
    settings = recipe.recipe
    with context.progress.stage("text"):
        tokenizer = load_tokenizer(settings.model.source, revision=settings.model.revision)
        empty = skeleton(target.config)
        # Prompts that cannot be rendered are reported before anything runs.
        render_prompts(settings.evaluate.samples, target.adapter, tokenizer)
        check_lengths(empty, run_lengths(settings, tokenizer, target.adapter))
        text = read_text(settings, target, tokenizer, TokenCache(context.cache))
        tasks = load_tasks(settings.evaluate.zero_shot, tokenizer, empty)
        context.work.claim(_fingerprints(settings, target, text))
    with context.progress.stage("load"):
        calibration = CalibrationText(text.calibration, text.batch_size)
        dtypes = choose_dtypes(settings.model, target.config, runtime.device)
        resume = store.find if store else make_without_store
        folder = context.work.folder
        executor = open_executor(recipe, target, calibration, runtime, folder, cache=context.cache, resume=resume)
        params = executor.model.num_parameters()
        budget = open_budget(recipe, target, params, dtypes.saved)
    left = (params - budget.budget.params) * dtypes.saved.itemsize
    # A recovery writes the pruned model first, and its output at the end.
    recovered = recipe.output.resolve() != context.work.output
    check_space(context.work.output, left * (2 if recovered else 1))
    return Subject(recipe, target, tokenizer, text, tasks, executor, params, budget, dtypes)


def _fingerprints(settings: Recipe, target: Target, text: RunText) -> dict[str, Any]:
    """Identify the text, weights and plugins that a recipe names, so that a change is detected."""
    folder = Path(settings.model.source).expanduser()
    weights = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))] if folder.is_dir() else []
    if folder.is_file():
        weights = [(folder.name, folder.stat())]
    return {
        "text": {
            "calibration": tokens_hash(text.calibration),
            **{name: tokens_hash(evaluation.windows.labels) for name, evaluation in text.evaluations.items()},
        },
        "model files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in weights},
        "model commit": getattr(target.config, "_commit_hash", None),
        **({"block times": _times_hash(settings, target)} if settings.budget.latency is not None else {}),
        "plugin files": {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in settings.plugins},
    }


def _times_hash(settings: Recipe, target: Target) -> str:
    budget = settings.budget
    times = find_times(target.sites, settings.model.source, budget.batch, budget.prompt)
    return hashlib.sha256(times.to_json().encode()).hexdigest()


def _measure_dense(subject: Subject, runtime: Runtime, store: ResumeStore | None) -> Measurements:
    """Measure the dense model, or read the measurements of an interrupted run."""
    if store is None:
        return _measure(subject, runtime, "dense")
    return Measurements(
        store.perplexity("perplexity", subject.text.evaluations, partial(_perplexity, subject, "dense")),
        store.figures("zero-shot", dict[str, TaskScores], partial(_answers, subject, runtime, "dense")),
        store.figures("samples", list[str], partial(_samples, subject, runtime, "dense")),
    )


def _measure(subject: Subject, runtime: Runtime, which: str) -> Measurements:
    """Measure the ``dense`` or the ``pruned`` model by the recipe's ``evaluate`` section."""
    return Measurements(
        _perplexity(subject, which), _answers(subject, runtime, which), _samples(subject, runtime, which)
    )


def _perplexity(subject: Subject, which: str) -> Mapping[str, MeasuredPerplexity]:
    return subject.executor.evaluate(subject.text.evaluations, f"evaluate {which}")


def _answers(subject: Subject, runtime: Runtime, which: str) -> Mapping[str, TaskScores]:
    return evaluate_tasks(subject.executor.model, subject.tokenizer, subject.tasks, runtime, f"zero-shot {which}")


def _samples(subject: Subject, runtime: Runtime, which: str) -> list[str]:
    settings = subject.recipe.recipe.evaluate.samples
    prompts = render_prompts(settings, subject.target.adapter, subject.tokenizer)
    return sample(subject.executor.model, subject.tokenizer, settings, prompts, runtime, f"sample {which}")


def _write(record: RunRecord, executor: Executor, context: RunContext, *, overwrite: bool) -> RunRecord:
    """Write the output and its exports in the first process; the others wait until the output is complete."""
    progress = context.progress

    def save() -> None:
        context.journal.totals(record.params, record.seconds)
        files = context.journal.files()
        save_run(record, executor.model, files, weights=executor.shards, overwrite=overwrite, work=context.work)
        if record.output.resolve() == context.work.output:
            context.work.finish()

    with progress.stage("save"):
        broadcast_from_rank0(save)
    if not is_rank_zero():
        return record
    exports = export_all(record.output, record.recipe.exporters, progress)
    record = replace(record, exports=exports, total_seconds=progress.total)
    if record.output.resolve() == context.work.output:
        rewrite_result(record.output, record.result())
    return record
