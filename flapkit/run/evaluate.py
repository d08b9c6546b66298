"""Evaluate a checkpoint as a recipe says, without pruning anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flapkit.checkpoint.load import load_config, load_tokenizer
from flapkit.evaluation.zero_shot import by_task
from flapkit.execution.runtime import Runtime
from flapkit.model.soundness import check_unquantised
from flapkit.recipe.load import LoadedRecipe
from flapkit.run.executors import load_model, open_runtime
from flapkit.run.record import put_texts_beside
from flapkit.run.tasks import ask, load_tasks
from flapkit.run.text import read_evaluations, renderer
from flapkit.system.errors import InputError
from flapkit.system.processes import lost_processes
from flapkit.system.progress import Progress


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured of a checkpoint, alone or beside a dense model.

    Args:
        checkpoint: the model that was asked about.
        against: the dense model beside it; None where it stood alone.
        perplexity: as in ``result.json``; where the model stood alone with ``model`` for ``dense`` and ``pruned``.
        zero_shot: the same of the tasks.
    """

    checkpoint: str
    against: str | None
    perplexity: Mapping[str, Any]
    zero_shot: Mapping[str, Any]

    def to_json(self) -> str:
        """Write everything as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


def evaluate_checkpoint(
    checkpoint: str, recipe: LoadedRecipe, against: str | None = None, progress: Progress | None = None
) -> Evaluation:
    """Measure what a recipe's ``evaluate`` section asks for.

    Args:
        checkpoint: a folder, a hub id, or ``builtin:NAME``.
        recipe: its ``evaluate``, ``trainer``, ``adapter`` and ``model.dtype`` count.
        against: the dense model, if there is one to compare with; it is given the checkpoint's tokens.
        progress: whom the stages tell how far they are.

    Raises:
        FlapkitError: whatever keeps the evaluation from its end.
    """
    asked = recipe.recipe
    if not asked.evaluate.perplexity and asked.evaluate.zero_shot is None:
        raise InputError(f"{recipe.path}: evaluate: it asks for nothing; give texts in `perplexity`, or `zero_shot`")
    runtime = open_runtime(asked.trainer, progress)
    with lost_processes():
        return _evaluate(checkpoint, recipe, against, runtime)


def _evaluate(checkpoint: str, recipe: LoadedRecipe, against: str | None, runtime: Runtime) -> Evaluation:
    asked = recipe.recipe
    with runtime.progress.stage("text"):
        config, tokenizer = load_config(checkpoint), load_tokenizer(checkpoint)
        check_unquantised(checkpoint, config)
        render = renderer(recipe.adapter, tokenizer)
        texts = read_evaluations(asked.evaluate.perplexity, tokenizer, render, config.get_text_config().vocab_size)
        tasks = load_tasks(asked.evaluate.zero_shot)
    paths = {"model": checkpoint} if against is None else {"dense": against, "pruned": checkpoint}
    measured, answers = {}, {}
    for role, path in paths.items():
        model = load_model(recipe.of_model(path), runtime)
        measured[role] = runtime.evaluate(model, texts, f"evaluate {role}")
        answers[role] = ask(model, tokenizer, tasks, runtime, f"zero-shot {role}")
    return Evaluation(checkpoint, against, put_texts_beside(measured), by_task(answers))
