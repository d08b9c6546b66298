"""Zero-shot tasks by lm-eval, on a model in memory."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapkit.evaluation.local_tasks import TASKS, find_task
from flapkit.evaluation.scores import BatchSize, Figure, Score, TaskScores
from flapkit.evaluation.significance import compare
from flapkit.system.errors import InputError

if TYPE_CHECKING:
    from flapkit.evaluation.harness import Harness

ACCURACIES = ("acc_norm", "acc")
"""lm-eval's names of accuracies, that by which a task is judged first."""

MEAN = "mean"
"""The name of the mean over tasks, beside the names of the tasks."""


def load_harness(
    tasks: Sequence[str], *, data_dir: Path | None = None, limit: int | None = None, batch_size: BatchSize = "auto"
) -> Harness:
    """Load tasks and their rows, so that errors in them appear before any model is loaded.

    Args:
        tasks: lm-eval's names of tasks and groups.
        data_dir: a folder with a file for each selected task of ``TASKS``; lm-eval downloads other tasks, or all of
            them without a folder.
        limit: items per task, from the first; by default all.
        batch_size: requests per batch, or ``auto``.

    Raises:
        InputError: lm-eval is not installed, a task is unknown, or its rows cannot be loaded.
    """
    check_installed()
    local = {name: find_task(name, data_dir) for name in tasks if data_dir is not None and name in TASKS}
    # Imported here, since importing lm-eval takes seconds.
    from flapkit.evaluation.harness import Harness

    return Harness.load(tasks, local, limit, batch_size)


def check_installed() -> None:
    """Raise ``InputError``, with the command to install it, if lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError('zero-shot tasks need lm-eval; install it with: pip install "flapkit[zeroshot]"')


def by_task(models: Mapping[str, Mapping[str, TaskScores]]) -> dict[str, Any]:
    """Arrange the scores of several models by task and metric, as in ``result.json``.

    Args:
        models: model -> task -> scores; the same tasks for every model.

    Returns:
        Task -> its description, and metric -> each model's ``value`` and ``stderr``; with ``paired`` if there are two
        models and the metric is 0 or 1 for every item.
    """
    tasks = next(iter(models.values()))
    return {
        name: describe(first) | {"metrics": _metrics({model: scores[name] for model, scores in models.items()})}
        for name, first in tasks.items()
    }


def main_scores(models: Mapping[str, Mapping[str, TaskScores]]) -> dict[str, dict[str, Figure]]:
    """Choose one score for each task, and average those that are accuracies.

    A task's score is ``acc_norm`` if it has one, otherwise ``acc``, otherwise its first metric.

    Args:
        models: model -> task -> scores; the same tasks for every model.

    Returns:
        Task, and last ``mean`` if there is an accuracy -> model -> ``value`` and ``stderr``. The standard error of the
        mean takes the tasks as independent; None if one of theirs is not known.
    """
    metrics = {name: _main_metric(task) for name, task in next(iter(models.values())).items() if task.scores}
    chosen = {
        name: {model: scores[name].scores[metric] for model, scores in models.items()}
        for name, metric in metrics.items()
    }
    board = {name: {model: _figures(score) for model, score in scores.items()} for name, scores in chosen.items()}
    if averaged := [scores for name, scores in chosen.items() if metrics[name] in ACCURACIES]:
        board[MEAN] = {model: _mean([scores[model] for scores in averaged]) for model in models}
    return board


def _main_metric(task: TaskScores) -> str:
    return next((metric for metric in ACCURACIES if metric in task.scores), next(iter(task.scores)))


def _figures(score: Score) -> Figure:
    return {"value": score.value, "stderr": score.stderr}


def _mean(scores: Sequence[Score]) -> Figure:
    errors = [score.stderr for score in scores if score.stderr is not None]
    stderr = math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None
    return {"value": sum(score.value for score in scores) / len(scores), "stderr": stderr}


def add_scores(known: Mapping[str, Any], stage: str, scores: Mapping[str, TaskScores]) -> dict[str, Any]:
    """Add another model's scores to those of earlier models.

    Args:
        known: output of ``by_task``; may be empty.
        stage: the model's name in the output, for example ``recovered``.
        scores: task -> scores.
    """
    extended = {}
    for name, task in scores.items():
        metrics = known.get(name, {}).get("metrics", {})
        added = {metric: {**metrics.get(metric, {}), stage: _figures(score)} for metric, score in task.scores.items()}
        extended[name] = describe(task) | {"metrics": added}
    return extended


def describe(scores: TaskScores) -> dict[str, Any]:
    """Return a task's description: all fields but the scores."""
    return {name: value for name, value in asdict(scores).items() if name != "scores"}


def _metrics(models: Mapping[str, TaskScores]) -> dict[str, Any]:
    return {
        name: _by_model({model: task.scores[name] for model, task in models.items()})
        for name in next(iter(models.values())).scores
    }


def _by_model(models: Mapping[str, Score]) -> dict[str, Any]:
    entry: dict[str, Any] = {model: _figures(score) for model, score in models.items()}
    items = [score.items for score in models.values()]
    if len(items) == 2 and all(values and set(values) <= {0.0, 1.0} for values in items):
        entry["paired"] = asdict(compare(*items))
    return entry
