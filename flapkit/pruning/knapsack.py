"""The plan whose removed units have the smallest sum of scores: a knapsack, solved exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import Tensor

from flapkit.model.budget import Budget, unit_costs
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.pruning.ranking import Blocks, blocks_of, remove_blocks, remove_lowest
from flapkit.system.errors import InputError

MOST_SUMS = 2_000_000
"""Sums of costs that are tried together. A model has few kinds of units, and so few sums; more would take minutes."""


def remove_cheapest(
    sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget, min_units: int = 1
) -> PruningPlan:
    """Remove the units whose scores have the smallest sum, of all choices that meet the budget to within one unit.

    Of units that cost the same, the lowest scores are the best choice. So the plan follows from how many units go of
    each cost, and a model has few costs: that of a head, and that of a neuron. Where the budget counts the biases of
    corrections, the result may miss the best plan by what a bias is worth.

    Args:
        sites: the sites to prune, in the model's order.
        scores: site name -> one value per unit [units]; that of several units is their sum.
        budget: how much to remove.
        min_units: units that every site keeps.

    Returns:
        The units to keep at each site.

    Raises:
        BudgetError: ``min_units`` does not allow the budget.
        InputError: the units have too many costs.
    """
    cost = budget.cost
    density = {site.name: scores[site.name] / cost.of(site) for site in sites}
    first = remove_lowest(sites, density, budget, min_units)
    # Where the cheapest units run out, no plan may come as close to the budget as one of them.
    least = min(budget.amount - min(unit_costs(sites, cost)) + 1, cost.removed(sites, first))
    divided = blocks_of(sites, scores, budget, min_units)
    for low in range(least, budget.amount + 1, max(cost.added.values(), default=0) or budget.amount + 1):
        taken = _solve(divided, low, budget.amount)
        plan = remove_blocks(sites, scores, taken, min_units) if taken else first
        # A site's first block counts for less, by its bias; if only later ones were taken, it goes instead.
        if cost.removed(sites, plan) >= least:
            return plan
    return first


def _solve(divided: Sequence[Blocks], least: int, most: int) -> list[int]:
    """Return how many blocks of each group go for a cost from ``least`` to ``most``; empty if there is no such choice.

    Dynamic programming over the costs, the one with the most blocks last.
    """
    kinds: dict[int, list[tuple[float, int]]] = {}
    for group, blocks in enumerate(divided):
        for value, cost in zip(blocks.values, blocks.costs, strict=True):
            kinds.setdefault(cost, []).append((value, group))
    *few, (unit, many) = sorted(
        ((cost, sorted(blocks)) for cost, blocks in kinds.items()), key=lambda kind: len(kind[1])
    )
    sums: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for cost, some in few:
        sums = _extended(sums, cost, _prefixes(some), most)
    prefix, best = _prefixes(many), (float("inf"), tuple[int, ...]())
    for spent, (value, counts) in sums.items():
        for count in range(max(0, -(-(least - spent) // unit)), min(len(many), (most - spent) // unit) + 1):
            best = min(best, (value + prefix[count], (*counts, count)))
    taken = [0] * len(divided)
    for (_, gone), count in zip([*few, (unit, many)], best[1], strict=False):
        for _, group in gone[:count]:
            taken[group] += 1
    return taken if best[1] else []


def _extended(
    sums: Mapping[int, tuple[float, tuple[int, ...]]], cost: int, prefix: Sequence[float], most: int
) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Add some number of blocks of one cost to each choice; of choices that cost the same, the best one stays."""
    extended: dict[int, tuple[float, tuple[int, ...]]] = {}
    for spent, (value, counts) in sums.items():
        for count in range(min(len(prefix) - 1, (most - spent) // cost) + 1):
            total, reached = spent + count * cost, value + prefix[count]
            if total not in extended or reached < extended[total][0]:
                extended[total] = (reached, (*counts, count))
    if len(extended) > MOST_SUMS:
        raise InputError("searcher knapsack: the model's units have too many different costs; use per_parameter")
    return extended


def _prefixes(blocks: Sequence[tuple[float, int]]) -> list[float]:
    """Return the sums of the first values, from none to all."""
    return [0.0, *accumulate(value for value, _ in blocks)]
