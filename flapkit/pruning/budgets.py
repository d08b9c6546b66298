"""What a budget means for a model: the costs that are counted, and how much of one goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flapkit.evaluation.block_table import find_times
from flapkit.model.budget import Budget, Cost
from flapkit.model.costs import active_cost, cache_cost, param_cost, weight_cost
from flapkit.model.site import Site
from flapkit.pruning.budget_keys import BudgetSection
from flapkit.system.errors import BudgetError
from flapkit.system.sizes import parse_bytes, parse_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class CostedBudget:
    """A budget, and the costs of its model.

    Args:
        budget: how much to remove.
        costs: what the model costs in every measure that it has.
    """

    budget: Budget
    costs: tuple[Cost, ...]


def work_out(
    asked: BudgetSection,
    model: PreTrainedModel,
    sites: Sequence[Site],
    params: int,
    saved: torch.dtype,
    *,
    biased: bool,
    name: str = "",
) -> CostedBudget:
    """Work out what a budget means for a model.

    Args:
        asked: the budget's keys.
        model: the dense model; it may be on the meta device.
        sites: its sites.
        params: number of its parameters.
        saved: dtype of the written weights.
        biased: corrections add biases to the consumers that have none.
        name: the model's path, for messages.

    Raises:
        BudgetError: the model has not what is counted, or not so little of it can be left, or was not timed.
        ModelError: the model's configuration does not say what is needed.
    """
    counted = param_cost(model, sites, params, biased=biased)
    costs = [counted, weight_cost(counted, getattr(torch, asked.dtype) if asked.dtype else saved)]
    cache, active = cache_cost(sites, saved), active_cost(model, sites, counted)
    costs += [cache] if cache.total else []
    costs += [active] if active else []
    if asked.latency is not None:
        _check_timed(asked, sites)
        costs.append(find_times(sites, name, asked.batch, asked.prompt).cost(asked.on))
    if asked.ratio is not None:
        return CostedBudget(Budget.over(sites, asked.ratio, asked.of, params, asked.rounding), tuple(costs))
    cost = next((cost for cost in costs if cost.measure == asked.kind), None)
    if cost is None or not cost.units:
        raise BudgetError(f"budget.{asked.asked}: {_missing(asked, model.config.model_type, sites)}")
    return CostedBudget(Budget.leaving(cost, sites, _left(asked, cost), asked.asked, asked.rounding), tuple(costs))


def _check_timed(asked: BudgetSection, sites: Sequence[Site]) -> None:
    """Raise ``BudgetError`` for units that ``flapkit bench --blocks`` does not time."""
    whole = next((site for site in sites if site.kind == "mixture"), None)
    single = next((site for site in sites if site.kind == "attention" and site.runs > 1), None)
    for site, what, key in (
        (whole, "whole experts", "expert_unit: channel"),
        (single, "query heads", "unit: kv_group"),
    ):
        if site is not None:
            raise BudgetError(
                f"budget.{asked.asked}: `flapkit bench --blocks` times no {what}, the units of {site.name}; set the "
                f"adapter's `{key}`"
            )


def _left(asked: BudgetSection, cost: Cost) -> int:
    """Return the most that the pruned model may cost."""
    if asked.memory is not None:
        return parse_bytes(asked.memory)
    if (share := asked.kv_cache or asked.latency) is not None:
        return int(share * cost.total)
    return cost.scale * parse_count(str(asked.params or asked.active_params))


def _missing(asked: BudgetSection, kind: str, sites: Sequence[Site]) -> str:
    """Say why no unit of a model has the cost that a budget counts."""
    if asked.latency is not None:
        return "in the table, no unit takes any time; run `flapkit bench --blocks` again, with more --repetitions"
    if asked.active_params is not None:
        return f"models of type {kind!r} have no experts, so a token uses all parameters; use params"
    heads = {site.kv_heads for site in sites if site.kind == "attention"}
    if heads == {1}:
        return f"this {kind!r} model has a single key/value head, which is not removed; use params or memory"
    if any(site.kind == "attention" and site.units > site.kv_heads > 0 for site in sites):
        return "its units are query heads, and no key/value head is removed; set the adapter's `unit: kv_group`"
    return f"models of type {kind!r} do not cache keys and values by head, so pruning does not shorten the cache"
