"""What a recipe's budget means for its model, and what the model costs before and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flapkit.model.budget import Budget
from flapkit.model.empty import skeleton
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.pruning.algorithm import find_plan
from flapkit.pruning.budgets import CostedBudget, work_out
from flapkit.recipe.load import LoadedRecipe
from flapkit.run.dtypes import choose_dtypes
from flapkit.run.executors import open_runtime
from flapkit.run.target import Target
from flapkit.system.errors import BudgetError


def open_budget(recipe: LoadedRecipe, target: Target, params: int, saved: torch.dtype) -> CostedBudget:
    """Work out a recipe's budget from its model's configuration.

    Args:
        recipe: the recipe.
        target: the model's sites.
        params: number of parameters of the dense model.
        saved: dtype of the written weights.

    Raises:
        BudgetError: the model has not what is counted, or not so little of it can be left, or was not timed.
        ModelError: the model's configuration does not say what is needed.
    """
    settings, empty, biased = recipe.recipe, skeleton(target.config), recipe.method.adds_bias
    try:
        return work_out(settings.budget, empty, target.sites, params, saved, biased=biased, name=settings.model.source)
    except BudgetError as error:
        raise BudgetError(f"{recipe.path}: {error}") from error


def refuse_unmet(recipe: LoadedRecipe, target: Target) -> None:
    """Raise ``BudgetError`` if a recipe's budget cannot be met, before anything is read or measured."""
    settings = recipe.recipe
    saved = choose_dtypes(settings.model, target.config, open_runtime(settings.trainer).device).saved
    opened = open_budget(recipe, target, skeleton(target.config).num_parameters(), saved)
    check_floors(recipe, target.sites, opened.budget)


def check_floors(recipe: LoadedRecipe, sites: Sequence[Site], budget: Budget) -> PruningPlan:
    """Search with made-up scores: whether the minimum sizes allow the budget depends only on sizes.

    Returns:
        A plan with probable widths; its units are arbitrary.

    Raises:
        BudgetError: the searcher cannot meet the budget.
    """
    scores = {site.name: torch.arange(site.units, dtype=torch.float64).view(-1, 1) for site in sites}
    try:
        return find_plan(sites, scores, recipe.searcher, budget)
    except BudgetError as error:
        raise BudgetError(f"{recipe.path}: {error}") from error
