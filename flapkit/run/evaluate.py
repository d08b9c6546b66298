"""Evaluate a checkpoint by a recipe's ``evaluate`` section, without pruning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flapkit.checkpoint.load import load_config, load_tokenizer
from flapkit.evaluation.zero_shot import by_task
from flapkit.execution.runtime import Runtime
from flapkit.model.empty import skeleton
from flapkit.model.positions import check_lengths
from flapkit.model.soundness import check_unquantised
from flapkit.recipe.load import LoadedRecipe
from flapkit.run.executors import load_model, open_runtime
from flapkit.run.lengths import evaluation_lengths
from flapkit.run.run_record import put_texts_beside
from flapkit.run.tasks import evaluate_tasks, load_tasks
from flapkit.run.text import check_evaluation, read_evaluations, renderer
from flapkit.system.errors import InputError
from flapkit.system.processes import lost_processes
from flapkit.system.progress import Progress


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The evaluation of a checkpoint, with or without a dense model.

    Args:
        checkpoint: the evaluated model.
        against: the dense model it is compared with; None for none.
        perplexity: as in ``result.json``; without a dense model, ``model`` replaces ``dense`` and ``pruned``.
        zero_shot: the scores of the tasks, likewise.
    """

    checkpoint: str
    against: str | None
    perplexity: Mapping[str, Any]
    zero_shot: Mapping[str, Any]

    def to_json(self) -> str:
        """Convert the evaluation to JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


def evaluate_checkpoint(
    checkpoint: str, recipe: LoadedRecipe, against: str | None = None, progress: Progress | None = None
) -> Evaluation:
    """Evaluate a checkpoint by a recipe's ``evaluate`` section.

    Args:
        checkpoint: a folder, a hub id, or ``builtin:NAME``.
        recipe: its ``evaluate``, ``trainer``, ``adapter`` and ``model.dtype`` are used.
        against: a dense model to compare with; it gets the checkpoint's tokens.
        progress: receives the progress of the stages.

    Raises:
        FlapkitError: the evaluation fails.
    """
    settings = recipe.recipe
    if not settings.evaluate.perplexity and settings.evaluate.zero_shot is None:
        raise InputError(f"{recipe.path}: evaluate: nothing to evaluate; set `perplexity` or `zero_shot`")
    check_evaluation(settings.evaluate)
    runtime = open_runtime(settings.trainer, progress)
    with lost_processes():
        return _evaluate(checkpoint, recipe, against, runtime)


def _evaluate(checkpoint: str, recipe: LoadedRecipe, against: str | None, runtime: Runtime) -> Evaluation:
    settings = recipe.recipe
    with runtime.progress.stage("text"):
        config, tokenizer = load_config(checkpoint), load_tokenizer(checkpoint)
        check_unquantised(checkpoint, config)
        empties = [skeleton(known) for known in (config, *([] if against is None else [load_config(against)]))]
        for empty in empties:
            check_lengths(empty, evaluation_lengths(settings.evaluate, tokenizer, recipe.adapter))
        render = renderer(recipe.adapter, tokenizer)
        texts = read_evaluations(settings.evaluate.perplexity, tokenizer, render, config.get_text_config().vocab_size)
        tasks = load_tasks(settings.evaluate.zero_shot, tokenizer, *empties)
    paths = {"model": checkpoint} if against is None else {"dense": against, "pruned": checkpoint}
    measured, answers = {}, {}
    for role, path in paths.items():
        model = load_model(recipe.of_model(path), runtime)
        measured[role] = runtime.evaluate(model, texts, f"evaluate {role}")
        answers[role] = evaluate_tasks(model, tokenizer, tasks, runtime, f"zero-shot {role}")
    return Evaluation(checkpoint, against, put_texts_beside(measured), by_task(answers))
