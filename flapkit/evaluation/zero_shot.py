"""Zero-shot tasks by lm-eval, on a model in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapkit.evaluation.local_tasks import TASKS, find_task
from flapkit.evaluation.significance import compare
from flapkit.system.errors import InputError

if TYPE_CHECKING:
    from flapkit.evaluation.harness import Harness
from flapkit.evaluation.scores import BatchSize, Score, TaskScores


def load_harness(
    tasks: Sequence[str], *, data_dir: Path | None = None, limit: int | None = None, batch_size: BatchSize = "auto"
) -> Harness:
    """Load tasks and their rows, so that what is wrong with them is known before any model is loaded.

    Args:
        tasks: lm-eval's names of tasks and groups.
        data_dir: a folder with a file for each of the seven tasks of ``TASKS`` that is asked for; other tasks, or all
            of them where there is no folder, come as lm-eval fetches them.
        limit: items of each task, from the first; all if not given.
        batch_size: requests at once; ``auto`` finds it.

    Raises:
        InputError: lm-eval is not installed, a task is unknown, or its rows cannot be had.
    """
    check_installed()
    local = {name: find_task(name, data_dir) for name in tasks if data_dir is not None and name in TASKS}
    # lm-eval takes seconds to import; runs without zero-shot tasks do without.
    from flapkit.evaluation.harness import Harness

    return Harness.load(tasks, local, limit, batch_size)


def check_installed() -> None:
    """Raise ``InputError``, which says what to install, where lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError('zero-shot tasks need lm-eval; install it with: pip install "flapkit[zeroshot]"')


def side_by_side(dense: Mapping[str, TaskScores], pruned: Mapping[str, TaskScores]) -> dict[str, Any]:
    """Put the scores of the dense and of the pruned model side by side, with a paired test."""
    return put_beside({"dense": dense, "pruned": pruned})


def put_beside(models: Mapping[str, Mapping[str, TaskScores]]) -> dict[str, Any]:
    """Put some models' scores beside each other, as in ``result.json``.

    Args:
        models: model -> task -> scores; the same tasks of every model.

    Returns:
        Task -> what was asked, and metric -> each model's ``value`` and ``stderr``, with ``paired`` where there are
        two models and the metric is right or wrong for each item.
    """
    tasks = next(iter(models.values()))
    return {
        name: describe(asked) | {"metrics": _metrics({model: found[name] for model, found in models.items()})}
        for name, asked in tasks.items()
    }


def add_scores(known: Mapping[str, Any], stage: str, scores: Mapping[str, TaskScores]) -> dict[str, Any]:
    """Put one more model's scores beside those that are known.

    Args:
        known: as ``side_by_side`` gives them; may be empty.
        stage: what the scores are called, for example ``recovered``.
        scores: task -> scores.
    """
    found = {}
    for name, each in scores.items():
        metrics = known.get(name, {}).get("metrics", {})
        added = {
            metric: {**metrics.get(metric, {}), stage: {"value": score.value, "stderr": score.stderr}}
            for metric, score in each.scores.items()
        }
        found[name] = describe(each) | {"metrics": added}
    return found


def describe(scores: TaskScores) -> dict[str, Any]:
    """Say what was asked, without the scores."""
    return {name: value for name, value in asdict(scores).items() if name != "scores"}


def mean_accuracy(scores: Mapping[str, TaskScores]) -> float | None:
    """Return the mean over tasks of ``acc_norm``, or of ``acc`` where a task has no such: the tables' usual mean.

    None where a task has neither.
    """
    found = [each.scores.get("acc_norm", each.scores.get("acc")) for each in scores.values()]
    values = [score.value for score in found if score is not None]
    return sum(values) / len(values) if values and len(values) == len(found) else None


def _metrics(models: Mapping[str, TaskScores]) -> dict[str, Any]:
    return {
        name: _beside({model: found.scores[name] for model, found in models.items()})
        for name in next(iter(models.values())).scores
    }


def _beside(models: Mapping[str, Score]) -> dict[str, Any]:
    found: dict[str, Any] = {model: {"value": each.value, "stderr": each.stderr} for model, each in models.items()}
    items = [each.items for each in models.values()]
    if len(items) == 2 and all(each and set(each) <= {0.0, 1.0} for each in items):
        found["paired"] = asdict(compare(*items))
    return found
