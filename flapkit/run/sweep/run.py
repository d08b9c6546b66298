"""Run a sweep: one dense model in memory, one calibration for all points that share it, each point on a cheap copy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flapkit.checkpoint.load import load_tokenizer
from flapkit.execution.cache import TokenCache
from flapkit.execution.executor import needed_for_search
from flapkit.execution.record_files import hash_tensors
from flapkit.execution.resume import ResumeStore
from flapkit.model.empty import skeleton
from flapkit.model.positions import check_lengths
from flapkit.pruning.collector import Statistics
from flapkit.pruning.components import TrainedSearcher, recovery_of
from flapkit.pruning.gates import check_gated
from flapkit.pruning.statistics import Statistic
from flapkit.run.dtypes import choose_dtypes
from flapkit.run.executors import load_whole, open_runtime
from flapkit.run.lengths import recovery_length, run_lengths
from flapkit.run.recover import read_training
from flapkit.run.sweep.load import Point, Sweep
from flapkit.run.sweep.plot import draw
from flapkit.run.sweep.point import Dense, Measured, PointText, Task, failed, measure_dense, run_point
from flapkit.run.sweep.results import Results, Row
from flapkit.run.sweep.table import table, to_csv
from flapkit.run.target import Target, find_target
from flapkit.run.tasks import load_tasks
from flapkit.run.text import check_text, read_text, recovery_source
from flapkit.system.errors import FlapkitError, RecipeError
from flapkit.system.progress import Progress
from flapkit.system.workdir import open_workdir, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

T = TypeVar("T")


def run_sweep(sweep: Sweep, folder: Path, *, progress: Progress | None = None, cache: Path | None = None) -> list[Row]:
    """Run the points of a sweep that have no result yet, and write its table and plot.

    A point that fails does not stop the others.

    Args:
        sweep: the sweep.
        folder: where rows are written as points finish; an interrupted sweep resumes from them.
        progress: shows the stages.
        cache: folder of the cache of statistics; None for no cache.

    Returns:
        The rows of all points, in the sweep's order.

    Raises:
        FlapkitError: the text or the model that points share cannot be used, or the folder cannot be written.
    """
    progress = progress or Progress()
    check_sweep(sweep)
    with open_workdir(folder, {"sweep": str(folder.resolve())}, resume=True) as work:
        results, store, ids = Results(folder), ResumeStore(work), {}
        with progress.stage("points", len(sweep.points), "points") as stage:
            for points in _grouped(sweep.points, _model_key):
                for task in _run_group(points, results, store, progress, cache, stage.advance):
                    ids[id(task.point)] = task.id
        rows = [results.of(ids[id(point)], point.settings, point.method) for point in sweep.points]
        write_file(folder / "table.csv", to_csv(table(sweep.keys, rows)))
        for kind in ("png", "svg"):
            write_file(folder / f"plot.{kind}", draw(rows, sweep.keys, sweep.file.plot, kind))
        work.finish()
    return rows


def check_sweep(sweep: Sweep) -> None:
    """Raise ``RecipeError`` with the problems of all points that can be checked before anything runs."""
    problems: list[str] = []
    checked: list[Any] = []
    for point in sweep.points:
        settings = point.recipe.recipe
        try:
            runtime = open_runtime(settings.trainer)
            if runtime.processes > 1 or runtime.sharded:
                raise RecipeError(
                    "a sweep runs on one device; set trainer.devices and trainer.num_nodes to 1, and remove strategy"
                )
            target, lengths = find_target(point.recipe), run_lengths(settings, None, None)
            check_text(settings)
            if isinstance(point.recipe.searcher, TrainedSearcher):
                check_gated(target.sites)
            if (recovery := recovery_of(point.recipe.compensators)) is not None:
                recovery_source(recovery.training, settings)
                lengths |= recovery_length(recovery.training)
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
    store: ResumeStore,
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
        weights = hash_tensors(model.state_dict().items())
        params = model.num_parameters()
        dense = Dense(model, weights, target, tokenizer, runtime, params, dtypes.saved, store, cache)
    tasks = [Task.of(point, text, dense) for point, text in zip(points, texts, strict=True)]
    missing = {task.id: task for task in tasks if not results.done(task.id)}
    for _ in range(len(tasks) - len(missing)):
        advance()
    for same_evaluation in _grouped(missing.values(), lambda task: _evaluation_key(task.point)):
        before = measure_dense(same_evaluation[0], dense)
        for shared in _grouped(same_evaluation, lambda task: _calibration_key(task.point)):
            for row in _run_all(shared, dense, before):
                results.add(row)
                advance()
    return tasks


def _read_texts(
    points: Sequence[Point], target: Target, tokenizer: PreTrainedTokenizerBase, store: TokenCache
) -> list[PointText]:
    """Read the text of every point; text that several points share is read once."""
    known: dict[str, Any] = {}

    def once(key: str, read: Callable[[], T]) -> T:
        if key not in known:
            known[key] = read()
        value: T = known[key]
        return value

    def read_point(point: Point) -> PointText:
        recipe, settings = point.recipe, point.recipe.recipe
        recovery, asked = recovery_of(recipe.compensators), settings.evaluate.zero_shot
        key = _calibration_key(point) + _evaluation_key(point)
        text = once(f"text {key}", lambda: read_text(settings, target, tokenizer, store))
        tasks = once(f"tasks {asked}", lambda: load_tasks(asked, tokenizer, skeleton(target.config)))
        if recovery is None:
            return PointText(text, tasks, None)
        runtime, evaluations = open_runtime(settings.trainer), text.evaluations
        training = once(
            f"training {key} {recovery.training}",
            lambda: read_training(recipe, recovery, target, tokenizer, runtime, evaluations, store),
        )
        return PointText(text, tasks, training)

    return [read_point(point) for point in points]


def _calibrate(tasks: Sequence[Task], dense: Dense) -> Statistics | None:
    """Measure what points share in one pass; None if it does not fit, so that each point measures its own."""
    needed = [statistic for task in tasks for statistic in _shared(task)]
    return tasks[0].executor(dense.model, dense, dense.runtime).calibrate(tuple(dict.fromkeys(needed)))


def _shared(task: Task) -> tuple[type[Statistic], ...]:
    """List the statistics of a point on all windows.

    Sequential repair measures as it goes, and a search that judges plans measures the windows that it does not judge
    on.
    """
    method = task.point.recipe.method
    if method.judges:
        return () if task.sequential else method.repairing
    return (*method.scoring, *needed_for_search(method, sequential=task.sequential))


def _run_all(tasks: Sequence[Task], dense: Dense, before: Measured) -> Iterator[Row]:
    """Run points that share their calibration, one after the other; if calibration fails, all of them fail."""
    try:
        statistics = _calibrate(tasks, dense)
    except Exception as error:
        log.warning("calibration failed: %s", error)
        log.debug("", exc_info=error)
        yield from (failed(task, error) for task in tasks)
        return
    for task in tasks:
        yield run_point(task, dense, statistics, before)


def _model_key(point: Point) -> str:
    """Identify the dense model with its sites; budgets and exports can decide the attention unit."""
    adapter = find_target(point.recipe).adapter
    return f"{adapter} {point.recipe.recipe.model_dump_json(include={'model', 'trainer'})}"


def _calibration_key(point: Point) -> str:
    return point.recipe.recipe.calibration.model_dump_json(exclude={"sequential"})


def _evaluation_key(point: Point) -> str:
    return point.recipe.recipe.evaluate.model_dump_json()


def _grouped(items: Iterable[T], key: Callable[[T], str]) -> list[list[T]]:
    """Group items by key, in order of the first item of each group."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
