"""Say what a recipe will do, from its text and the model's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flapkit.calibration import needed_statistics
from flapkit.checkpoint import check_output, load_tokenizer
from flapkit.checkpoint.empty import build_empty
from flapkit.errors import BudgetError
from flapkit.evaluation.batch_size import CPU_TOKENS
from flapkit.interfaces import recovery_of
from flapkit.loggers import check_loggers
from flapkit.passes import count_passes, peak_memory, size_of
from flapkit.plan import Budget, PruningPlan
from flapkit.pruning import find_plan
from flapkit.recipe import Calibration, LoadedRecipe, Perplexity
from flapkit.recovery import Training
from flapkit.rounding import odd_widths
from flapkit.stages.target import Target, find_target
from flapkit.stages.text import recovery_source, source_of
from flapkit.stages.zero_shot import check_tasks
from flapkit.statistics import Gram
from flapkit.work import Work, check_space

BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will do and need.

    Args:
        target: the model's configuration, adapter and sites.
        params: parameters of the dense model.
        budget: how many parameters will go.
        weights: bytes of the dense weights.
        memory: bytes at the peak: weights, the activations of a calibration batch, the logits of an evaluation
            batch, the statistics, and what corrections take; or, if that is more, what a recovery needs.
        disk: bytes of the weights that are written; with a recovery, the pruned model is first written beside them.
        passes: how often the calibration text runs through the model.
        trained: parameters that a recovery trains, or None without one.
        odd: widths of MLPs that will probably be no multiple of 32, where kernels and quantised formats are fast.
        left: what a stopped run has left in the output's work folder.
    """

    target: Target
    params: int
    budget: Budget
    weights: int
    memory: int
    disk: int
    passes: int
    trained: int | None = None
    odd: Sequence[int] = ()
    left: Sequence[str] = ()


def check(recipe: LoadedRecipe, *, overwrite: bool = False) -> Estimate:
    """Check all that can be known without running, and estimate what the run needs.

    Raises:
        FlapkitError: the recipe cannot be carried out.
    """
    asked = recipe.recipe
    check_output(Path(asked.output).expanduser(), overwrite=overwrite)
    target = find_target(recipe)
    for text in (asked.calibration, *asked.evaluate.perplexity):
        source_of(text).check()
    if asked.evaluate.zero_shot is not None:
        check_tasks(asked.evaluate.zero_shot)
    check_loggers(asked.trainer.logger)
    load_tokenizer(asked.model.path, revision=asked.model.revision)
    empty = build_empty(target.config)
    params = empty.num_parameters()
    budget = Budget.over(target.sites, asked.budget.ratio, asked.budget.of, params, asked.budget.multiple_of)
    plan = _check_floors(recipe, target, budget)
    dtype: Any = target.config.dtype if asked.model.dtype == "auto" else getattr(torch, asked.model.dtype)
    size = BYTES.get(dtype, 4)
    memory = params * size + _working_memory(recipe, target, size)
    recovery, trained = recovery_of(recipe.compensators), None
    if recovery is not None:
        recovery_source(recovery.training, asked).check()
        recovery.attach(empty, target.sites)
        trained = sum(parameter.numel() for parameter in empty.parameters() if parameter.requires_grad)
        weights = size * (params - budget.params + (params if recovery.training.distill else 0))
        memory = max(memory, weights + _training_memory(recovery.training, target, size, trained))
    disk = size * (params - budget.params) * (1 if recovery is None else 2)
    output = Path(asked.output).expanduser()
    check_space(output, disk)
    text = asked.calibration
    passes = count_passes(target.sites, recipe.method, text.statistics_bytes, sequential=text.sequential)
    odd = odd_widths(target.sites, plan)
    left = Work(output).pieces()
    return Estimate(target, params, budget, params * size, memory, disk, passes, trained, odd, left)


def _check_floors(recipe: LoadedRecipe, target: Target, budget: Budget) -> PruningPlan:
    """Let the searcher try the budget on equal scores: whether the floors allow it depends on sizes alone.

    Returns:
        A plan of the widths that a run may come to, if not of its units.
    """
    scores = {site.name: torch.arange(site.units, dtype=torch.float64).view(-1, 1) for site in target.sites}
    try:
        return find_plan(target.sites, scores, recipe.searcher, budget)
    except BudgetError as error:
        raise BudgetError(f"{recipe.path}: {error}") from error


def _training_memory(training: Training, target: Target, size: int, trained: int) -> int:
    """Estimate the bytes that a recovery needs beside the weights."""
    tokens = training.batch_size * training.length
    # What the backward pass needs of each block: its input and its norm's, and about four tensors of its own width.
    kept: int = sum(6 * target.config.hidden_size + 4 * site.channels for site in target.sites)
    # Logits, their float copy and its gradient; the teacher's, and both logarithms.
    copies: int = size + 8 + (size + 12 if training.distill else 0)
    # Weights, gradients and AdamW's two moments, and the best so far.
    vocabulary: int = target.config.vocab_size
    return 20 * trained + tokens * (size * kept + copies * vocabulary)


def _working_memory(recipe: LoadedRecipe, target: Target, size: int) -> int:
    """Estimate the bytes beside the weights: the larger of calibration's and evaluation's."""
    widest = max(site.channels for site in target.sites)
    hidden = target.config.hidden_size
    asked = recipe.recipe

    def tokens(text: Calibration | Perplexity) -> int:
        return max(text.length, CPU_TOKENS) if text.batch_size == "auto" else text.batch_size * text.length

    # A layer's inputs and outputs, and the MLP's three products; the statistics' copy of an input in float64.
    calibration = tokens(asked.calibration) * (size * (4 * hidden + 3 * widest) + 8 * 2 * widest)
    evaluation = max(
        (tokens(text) * target.config.vocab_size * (size + 4) for text in asked.evaluate.perplexity), default=0
    )
    working: int = max(calibration, evaluation) + _statistics_memory(recipe, target, size)
    return working


def _statistics_memory(recipe: LoadedRecipe, target: Target, size: int) -> int:
    """Estimate the bytes of statistics, of one correction, and of the new weights that wait to be written."""
    text, method, sites = recipe.recipe.calibration, recipe.method, target.sites
    statistics = peak_memory(sites, method, text.statistics_bytes, sequential=text.sequential)
    repair = needed_statistics(method.compensators)
    # Least squares works on copies of its products: of all, of the fitted and of the held-out windows, and of the kept.
    solving = 3 * max(size_of(repair, [site]) for site in sites)
    consumers = size * sum(site.channels * site.out_features for site in sites)
    return statistics + solving + consumers * (int(Gram in repair) + int(text.sequential))
