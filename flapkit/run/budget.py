"""What a recipe's budget means for its model, and what the model costs before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flapkit.model.budget import Budget, Cost
from flapkit.model.costs import active_cost, cache_cost, param_cost, weight_cost
from flapkit.model.empty import skeleton
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.pruning.algorithm import find_plan
from flapkit.recipe.load import LoadedRecipe
from flapkit.recipe.schema import BudgetSection
from flapkit.run.block_times import find_times
from flapkit.run.dtypes import choose_dtypes
from flapkit.run.executors import open_runtime
from flapkit.run.target import Target
from flapkit.system.errors import BudgetError
from flapkit.system.sizes import parse_bytes, parse_count


@dataclass(frozen=True, slots=True)
class RunBudget:
    """A recipe's budget, and the costs of its model.

    Args:
        budget: how much to remove.
        costs: what the model costs in every measure that it has.
    """

    budget: Budget
    costs: tuple[Cost, ...]


def open_budget(recipe: LoadedRecipe, target: Target, params: int, saved: torch.dtype) -> RunBudget:
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
    section, sites = recipe.recipe.budget, target.sites
    empty = skeleton(target.config)
    counted = param_cost(empty, sites, params, biased=any(part.adds_bias for part in recipe.compensators))
    costs = [counted, weight_cost(counted, getattr(torch, section.dtype) if section.dtype else saved)]
    cache, active = cache_cost(sites, saved), active_cost(empty, sites, counted)
    costs += [cache] if cache.total else []
    costs += [active] if active else []
    if section.latency is not None:
        times = find_times(sites, recipe.recipe.model.source, section.batch, section.prompt)
        costs.append(times.cost(section.on))
    rounding = (section.multiple_of, section.tensor_parallel, section.head_counts or 0)
    if section.ratio is not None:
        return RunBudget(Budget.over(sites, section.ratio, section.of, params, *rounding), tuple(costs))
    cost = next((cost for cost in costs if cost.measure == section.kind), None)
    if cost is None or not cost.units:
        raise BudgetError(f"{recipe.path}: budget.{section.asked}: {_missing(section, target)}")
    try:
        return RunBudget(Budget.leaving(cost, sites, _left(section, cost), section.asked, *rounding), tuple(costs))
    except BudgetError as error:
        raise BudgetError(f"{recipe.path}: {error}") from error


def _left(section: BudgetSection, cost: Cost) -> int:
    """Return the most that the pruned model may cost."""
    if section.memory is not None:
        return parse_bytes(section.memory)
    if (share := section.kv_cache or section.latency) is not None:
        return int(share * cost.total)
    return cost.scale * parse_count(str(section.params or section.active_params))


def _missing(section: BudgetSection, target: Target) -> str:
    """Say why a model has not what a budget counts."""
    if section.latency is not None:
        return "by the table, no unit takes any time; run `flapkit bench --blocks` again, with more --repetitions"
    kind = target.config.model_type
    if section.active_params is not None:
        return f"models of type {kind!r} have no experts, so that a token uses all parameters; use params"
    heads = {site.kv_heads for site in target.sites if site.kind == "attention"}
    if heads == {1}:
        return f"this {kind!r} model has a single key/value head, which stays; use params or memory"
    if any(site.kind == "attention" and site.units > site.kv_heads > 0 for site in target.sites):
        return "its units are query heads, and the key/value heads stay; set the adapter's `unit: kv_group`"
    return f"models of type {kind!r} cache no keys and values of single heads, so that the cache keeps its size"


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
