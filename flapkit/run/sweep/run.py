"""Run a sweep: one dense model in memory, one calibration for all points that share it, each point on a cheap copy."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from flapkit.checkpoint.load import load_tokenizer
from flapkit.execution.cache import TokenCache
from flapkit.execution.executor import CalibrationText, prune_
from flapkit.execution.record_files import hash_tensors
from flapkit.execution.runtime import Runtime
from flapkit.execution.whole import WholeExecutor
from flapkit.model.empty import skeleton
from flapkit.model.positions import check_lengths
from flapkit.model.surgery import copy_sharing_weights
from flapkit.pruning.collector import Statistics
from flapkit.pruning.components import recovery_of
from flapkit.run.budget import open_budget
from flapkit.run.captured import capture_warnings
from flapkit.run.dtypes import choose_dtypes
from flapkit.run.executors import load_whole, open_runtime
from flapkit.run.lengths import run_lengths
from flapkit.run.run_record import compare, count_params
from flapkit.run.sweep.load import Point, Sweep
from flapkit.run.sweep.results import Results, Row
from flapkit.run.target import Target, find_target
from flapkit.run.text import RunText, read_text
from flapkit.system.errors import FlapkitError, RecipeError
from flapkit.system.progress import Progress
from flapkit.text.windows import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Dense:
    """The dense model that several points share.

    Args:
        model: the whole model, never changed.
        weights: SHA-256 of the weights.
        target: its configuration, adapter and sites.
        runtime: the devices that it runs on.
        params: its number of parameters.
        saved: the type that a pruned model of its kind would be written in.
    """

    model: PreTrainedModel
    weights: str
    target: Target
    runtime: Runtime
    params: int
    saved: torch.dtype


@dataclass(frozen=True, slots=True)
class Task:
    """A point, its text, and its id in the results."""

    point: Point
    text: RunText
    id: str


def run_sweep(
    sweep: Sweep,
    results: Results,
    *,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> list[Row]:
    """Run the points of a sweep that have no result yet; a point that fails does not stop the others.

    Args:
        sweep: the sweep.
        results: where rows are written as points finish.
        progress: shows the stages.
        cache: folder of the cache of statistics; None for no cache.

    Returns:
        The rows of all points, in the sweep's order.

    Raises:
        FlapkitError: the text or the model that points share cannot be used.
    """
    progress = progress or Progress()
    check_sweep(sweep)
    ids: dict[int, str] = {}
    with progress.stage("points", len(sweep.points), "points") as stage:
        for points in _grouped(sweep.points, _model_key):
            for task in _run_group(points, results, progress, cache, stage.advance):
                ids[id(task.point)] = task.id
    return [results.rows[ids[id(point)]] for point in sweep.points]


def check_sweep(sweep: Sweep) -> None:
    """Raise ``RecipeError`` with the problems of all points that can be checked before anything runs."""
    problems: list[str] = []
    checked: list[Any] = []
    for point in sweep.points:
        settings = point.recipe.recipe
        try:
            if recovery_of(point.recipe.compensators) is not None:
                raise RecipeError(
                    "a sweep does not train; remove the compensator that trains, and use `flapkit recover` afterwards"
                )
            runtime = open_runtime(settings.trainer)
            if runtime.processes > 1 or runtime.sharded:
                raise RecipeError(
                    "a sweep runs on one device; set trainer.devices and trainer.num_nodes to 1, and remove strategy"
                )
            target = find_target(point.recipe)
            settings.calibration.text.check("calibration")
            for text in settings.evaluate.perplexity:
                text.check("evaluation")
            lengths = run_lengths(settings, None, None)
            if (settings.model, lengths) not in checked:
                checked.append((settings.model, lengths))
                check_lengths(skeleton(target.config), lengths)
        except FlapkitError as error:
            problems.append(f"{sweep.path}: {point.label}: {error}")
    if problems:
        raise RecipeError(*dict.fromkeys(problems))


def _run_group(
    points: Sequence[Point],
    results: Results,
    progress: Progress,
    cache: Path | None,
    advance: Callable[[], None],
) -> list[Task]:
    """Run the points of one dense model."""
    first = points[0].recipe
    with progress.stage("text"):
        target = find_target(first)
        tokenizer = load_tokenizer(first.recipe.model.source, revision=first.recipe.model.revision)
        texts = _read_texts(points, target, tokenizer, TokenCache(cache))
    with progress.stage("load"):
        source = first.recipe.model
        runtime = open_runtime(first.recipe.trainer, progress)
        dtypes = choose_dtypes(source, target.config, runtime.device)
        dtypes.tell()
        model = load_whole(source, dtypes.compute, runtime)
        target.adapter.confirm(model, target.sites)
        dense = Dense(
            model,
            hash_tensors(model.state_dict().items()),
            target,
            runtime,
            model.num_parameters(),
            dtypes.saved,
        )
    tasks = [Task(point, text, _id(point, text, dense)) for point, text in zip(points, texts, strict=True)]
    missing = {task.id: task for task in tasks if not results.done(task.id)}
    for _ in range(len(tasks) - len(missing)):
        advance()
    for same_evaluation in _grouped(missing.values(), lambda task: _evaluation_key(task.point)):
        before = dense.runtime.evaluate(dense.model, same_evaluation[0].text.evaluations, "evaluate dense")
        for shared in _grouped(same_evaluation, lambda task: _calibration_key(task.point)):
            for row in _run_all(shared, dense, before, cache):
                results.add(row)
                advance()
    return tasks


def _read_texts(
    points: Sequence[Point], target: Target, tokenizer: PreTrainedTokenizerBase, store: TokenStore
) -> list[RunText]:
    """Read the text of every point; text that several points share is read once."""
    known: dict[str, RunText] = {}
    for point in points:
        key = _calibration_key(point) + _evaluation_key(point)
        if key not in known:
            known[key] = read_text(point.recipe.recipe, target, tokenizer, store)
    return [known[_calibration_key(point) + _evaluation_key(point)] for point in points]


def _calibrate(tasks: Sequence[Task], dense: Dense, cache: Path | None) -> Statistics | None:
    """Measure the statistics of all points in one pass; None if each point has to measure its own.

    That is so with sequential calibration, and if the memory for statistics does not hold them all.
    """
    if tasks[0].point.recipe.recipe.calibration.sequential:
        return None
    needed = dict.fromkeys(statistic for task in tasks for statistic in task.point.recipe.method.statistics)
    return _executor(dense.model, tasks[0], dense, dense.runtime, cache).calibrate(tuple(needed))


def _executor(
    model: PreTrainedModel,
    task: Task,
    dense: Dense,
    runtime: Runtime,
    cache: Path | None,
    statistics: Statistics | None = None,
) -> WholeExecutor:
    text = CalibrationText(task.text.calibration, task.text.batch_size)
    memory = task.point.recipe.recipe.calibration.statistics_bytes
    sites = dense.target.sites
    return WholeExecutor(
        model, sites, text, runtime, memory=memory, cache=cache, statistics=statistics, saved=dense.saved
    )


def _run_all(tasks: Sequence[Task], dense: Dense, before: Mapping[str, Any], cache: Path | None) -> Iterator[Row]:
    """Run points that share their calibration, one after the other; if calibration fails, all of them fail."""
    try:
        statistics = _calibrate(tasks, dense, cache)
    except Exception as error:
        log.warning("calibration failed: %s", error)
        log.debug("", exc_info=error)
        yield from (Row(task.id, task.point.settings, _message(error)) for task in tasks)
        return
    for task in tasks:
        yield _run_point(task, dense, statistics, before, cache)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _run_point(
    task: Task, dense: Dense, statistics: Statistics | None, before: Mapping[str, Any], cache: Path | None
) -> Row:
    """Prune a copy of the dense model and evaluate it; a failure becomes the row's error."""
    settings = task.point.settings
    progress = Progress()
    runtime = Runtime(dense.runtime.options, progress)
    with capture_warnings() as warnings:
        try:
            runtime.place_(dense.model)
            model = copy_sharing_weights(dense.model, dense.target.sites)
            recipe = task.point.recipe
            budget = open_budget(recipe, dense.target, dense.params, dense.saved).budget
            executor = _executor(model, task, dense, runtime, cache, statistics)
            pruned = prune_(executor, recipe.method, budget, sequential=recipe.recipe.calibration.sequential)
            after = runtime.evaluate(model, task.text.evaluations, "evaluate pruned")
        except Exception as error:
            log.warning("%s: failed: %s", task.point.label, error)
            log.debug("", exc_info=error)
            return Row(task.id, settings, _message(error), warnings=list(warnings))
        params = count_params(dense.target, pruned.plan, dense.params, model.num_parameters())
    return Row(task.id, settings, None, params, compare(before, after), progress.seconds, list(warnings))


def _id(point: Point, text: RunText, dense: Dense) -> str:
    """Hash everything that a point's result depends on."""
    tokens = {name: evaluation.windows.labels for name, evaluation in text.evaluations.items()}
    parts = [
        point.recipe.recipe.model_dump_json(exclude={"output", "export"}),
        dense.weights,
        hash_tensors([("calibration", text.calibration), *tokens.items()]),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _model_key(point: Point) -> str:
    return point.recipe.recipe.model_dump_json(include={"model", "adapter", "trainer"})


def _calibration_key(point: Point) -> str:
    return point.recipe.recipe.calibration.model_dump_json()


def _evaluation_key(point: Point) -> str:
    return point.recipe.recipe.evaluate.model_dump_json()


def _grouped(items: Iterable[T], key: Callable[[T], str]) -> list[list[T]]:
    """Group items by key, in order of the first item of each group."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
