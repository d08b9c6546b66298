"""The stage that evaluates lm-eval's zero-shot tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flapkit.evaluation.local_tasks import TASKS, find_task
from flapkit.evaluation.scores import TaskScores
from flapkit.evaluation.zero_shot import check_installed, load_harness
from flapkit.execution.runtime import Runtime
from flapkit.recipe.schema import ZeroShot

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flapkit.evaluation.harness import Harness


def check_tasks(settings: ZeroShot) -> None:
    """Raise ``InputError`` for problems that are visible without reading any row."""
    check_installed()
    if settings.data_dir is not None:
        for name in settings.tasks:
            if name in TASKS:
                find_task(name, Path(settings.data_dir).expanduser())


def load_tasks(
    settings: ZeroShot | None, tokenizer: PreTrainedTokenizerBase, *models: PreTrainedModel
) -> Harness | None:
    """Load a recipe's tasks and their rows; None if it has no tasks.

    Args:
        settings: the tasks.
        tokenizer: the models'.
        models: the models to evaluate; models without memory will do.

    Raises:
        InputError: lm-eval is not installed, a task is unknown, its rows cannot be read, or an answer is longer than a
            model's context.
    """
    if settings is None:
        return None
    folder = None if settings.data_dir is None else Path(settings.data_dir).expanduser()
    harness = load_harness(settings.tasks, data_dir=folder, limit=settings.limit, batch_size=settings.batch_size)
    for model in models:
        harness.check_answers(model, tokenizer)
    return harness


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harness: Harness | None,
    runtime: Runtime,
    name: str = "zero-shot",
) -> Mapping[str, TaskScores]:
    """Evaluate every task on a model, in the model's precision rather than the trainer's.

    Args:
        model: dense or pruned.
        tokenizer: the model's tokenizer.
        harness: the tasks; None for none.
        runtime: its device, and its progress.
        name: name of the stage.

    Raises:
        RunError: the model, or lm-eval, fails on a task.
    """
    if harness is None:
        return {}
    runtime.place_(model)
    with runtime.progress.stage(name, harness.items, "items") as stage:
        return harness.evaluate(model, tokenizer, stage.advance)
