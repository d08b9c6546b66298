"""Say what a recipe will do, from its text and the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flapkit.checkpoint import check_output, load_tokenizer
from flapkit.errors import BudgetError
from flapkit.evaluation.batch_size import CPU_TOKENS
from flapkit.plan import Budget
from flapkit.pruning import find_plan
from flapkit.recipe import Calibration, LoadedRecipe, Perplexity
from flapkit.stages.target import Target, find_target
from flapkit.stages.text import source_of
from flapkit.stages.zero_shot import check_tasks

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
            batch, and the statistics.
    """

    target: Target
    params: int
    budget: Budget
    weights: int
    memory: int


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
    load_tokenizer(asked.model.path, revision=asked.model.revision)
    params = _params(target)
    budget = Budget.over(target.sites, asked.budget.ratio, asked.budget.of, params)
    _check_floors(recipe, target, budget)
    dtype: Any = target.config.dtype if asked.model.dtype == "auto" else getattr(torch, asked.model.dtype)
    size = BYTES.get(dtype, 4)
    return Estimate(target, params, budget, params * size, params * size + _working_memory(recipe, target, size))


def _params(target: Target) -> int:
    """Count the dense model's parameters without allocating them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(target.config)
    count: int = model.num_parameters()
    return count


def _check_floors(recipe: LoadedRecipe, target: Target, budget: Budget) -> None:
    """Let the searcher try the budget on equal scores: whether the floors allow it depends on sizes alone."""
    scores = {site.name: torch.arange(site.units, dtype=torch.float64).view(-1, 1) for site in target.sites}
    try:
        find_plan(target.sites, scores, recipe.searcher, budget)
    except BudgetError as error:
        raise BudgetError(f"{recipe.path}: {error}") from error


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
    statistics = len(recipe.method.statistics)
    working: int = max(calibration, evaluation) + statistics * 8 * 2 * sum(site.channels for site in target.sites)
    return working
