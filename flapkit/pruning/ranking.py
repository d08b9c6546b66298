"""From scores to a plan: functions that structure searchers share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, groups
from flapkit.system.errors import BudgetError, InputError

_FLOOR = "with every site at its minimum"


def standardise(scores: Tensor) -> Tensor:
    """Subtract the mean of a site's scores and divide by their standard deviation.

    FLAP (arXiv 2312.11983), equation 7: it makes layers and modules comparable. The standard deviation is the unbiased
    one. If all scores are equal, the result is zero.

    Args:
        scores: scores of one site, any shape.

    Returns:
        The z-scores, of the same shape.
    """
    if scores.numel() < 2 or scores.max() == scores.min():
        return torch.zeros_like(scores)
    # Scaling by a power of two is exact, and keeps the squares of very small and very large scores within range.
    exponent = math.frexp(float(scores.abs().max()))[1]
    scaled = scores * 2.0 ** max(-1000, min(1000, -exponent))
    return (scaled - scaled.mean()) / scaled.std()


def raise_attention(sites: Sequence[Site], scores: Mapping[str, Tensor], power: float) -> dict[str, Tensor]:
    """Raise the scores of attention to a power, keeping their sign.

    FLAP's released code squares them; the paper (arXiv 2312.11983) does not say so.

    Args:
        sites: the pruned sites.
        scores: site name -> scores [units, k].
        power: the power.

    Returns:
        Site name -> scores [units, k]; those of the MLPs are unchanged.

    Raises:
        InputError: a result is out of float64's range.
    """
    raised = {}
    for site in sites:
        score = scores[site.name]
        if site.kind == "attention":
            score = score.sign() * score.abs().pow(power)
        if not torch.isfinite(score).all():
            raise InputError(f"{site.name}: scores to the attention_power {power:g} are out of range; choose 1 or 2")
        raised[site.name] = score
    return raised


def split_modules(sites: Sequence[Site], budget: Budget) -> tuple[list[Site], list[Site]]:
    """Split the sites into attention and MLP.

    Raises:
        BudgetError: one of the two is empty, so that the budget cannot be split between them.
    """
    attention = [site for site in sites if site.kind == "attention"]
    mlp = [site for site in sites if site.kind != "attention"]
    if not attention or not mlp:
        raise BudgetError(
            f"budget.of: {budget.of} leaves {'no MLP' if attention else 'no attention'} to prune, and this searcher "
            "splits the budget between the two; choose `blocks`, or another searcher"
        )
    return attention, mlp


def whole_units(sites: Sequence[Site], ratio: float) -> int:
    """Return how many whole units, all of one size, a ratio of the sites' parameters amounts to."""
    params = sum(site.params for site in sites)
    return round(ratio * params) * sum(site.units for site in sites) // max(params, 1)


def layer_ratios(sites: Sequence[Site], budget: Budget, profile: Sequence[float] = ()) -> dict[int, float]:
    """Divide a budget among the layers.

    Args:
        sites: the pruned sites.
        budget: how many parameters to remove.
        profile: relative ratios of the layers, in order; empty for equal ratios.

    Returns:
        Layer -> the fraction of its sites' parameters to remove; together they meet the budget.

    Raises:
        BudgetError: the profile has the wrong length, is all zero, or removes more than a whole layer.
    """
    params: dict[int, int] = {}
    for site in sites:
        params[site.layer] = params.get(site.layer, 0) + site.params
    if profile and (len(profile) != len(params) or not any(profile)):
        shown = ", ".join(f"{ratio:g}" for ratio in profile)
        raise BudgetError(f"profile: expected {len(params)} ratios, one per layer and not all 0, got {shown}")
    weights = dict(zip(params, profile or [1.0] * len(params), strict=True))
    total = sum(weight * params[layer] for layer, weight in weights.items())
    ratios = {layer: weight * budget.params / total for layer, weight in weights.items()}
    for layer, ratio in ratios.items():
        if ratio > 1:
            raise BudgetError(f"profile: scaled to the budget, it removes {ratio:.0%} of layer {layer}")
    return ratios


def remove_by_layer(
    sites: Sequence[Site],
    ranking: Mapping[str, Tensor],
    budget: Budget,
    profile: Sequence[float],
    min_units: int = 1,
) -> PruningPlan:
    """Remove the lowest units of each layer, heads and neurons ranked together, until its share of the budget is met.

    What a layer leaves of its share, less than a unit, goes to the next one, so that the whole plan falls short of the
    budget by less than a unit. A layer with the ratio 0 stays whole.

    Args:
        sites: the sites to prune, in the model's order.
        ranking: site name -> one value per unit [units]; low goes first within a layer.
        budget: how many parameters to remove.
        profile: relative ratios of the layers, in order; scaled to meet the budget.
        min_units: units that every site keeps.

    Returns:
        The units to keep at each site.

    Raises:
        BudgetError: the profile does not fit the layers, or ``min_units`` does not allow a layer's share.
    """
    keep: dict[str, tuple[int, ...]] = {}
    due = 0.0
    for layer, ratio in layer_ratios(sites, budget, profile).items():
        members = [site for site in sites if site.layer == layer]
        due += ratio * sum(site.params for site in members)
        plan = remove_lowest(members, ranking, round(due) if ratio else 0, min_units)
        due -= plan.removed_params(members)
        keep |= plan.keep
    return PruningPlan({site.name: keep[site.name] for site in sites})


def remove_units(sites: Sequence[Site], ranking: Mapping[str, Tensor], count: int, min_units: int = 1) -> PruningPlan:
    """Remove a number of units, the lowest of all sites together, regardless of their sizes.

    Where several units are removed at once (one query head of each key/value head), fewer than ``count`` may go.

    Args:
        sites: the sites to prune, in the model's order.
        ranking: site name -> one value per unit [units]; low goes first.
        count: how many units to remove.
        min_units: units that every site keeps.

    Returns:
        The units to keep at each site.

    Raises:
        BudgetError: ``min_units`` does not allow so many.
    """
    queues = _queues(sites, ranking, min_units, params=False)
    possible = _possible(queues)
    if count > possible:
        raise BudgetError(
            f"cannot remove {count} units from {_named(sites)}: {_FLOOR}, at most {possible} can be removed"
        )
    return _take(sites, queues, count)


def remove_lowest(
    sites: Sequence[Site], ranking: Mapping[str, Tensor], budget: Budget | int, min_units: int = 1
) -> PruningPlan:
    """Remove the lowest units of all sites together until the budget is met.

    Units are removed in ascending order; each costs its actual number of parameters. A unit that no longer fits is
    skipped in favour of cheaper ones after it, so that the result falls short of the budget by less than the smallest
    unit. Ties are broken by the order of the sites, then of the units.

    Args:
        sites: the sites to prune, in the model's order.
        ranking: site name -> one value per unit [units]; low goes first.
        budget: how much to remove; an int is a number of parameters.
        min_units: units that every site keeps.

    Returns:
        The units to keep at each site.

    Raises:
        BudgetError: ``min_units`` does not allow the budget.
    """
    queues = _queues(sites, ranking, min_units)
    _check_possible(queues, budget)
    return _take(sites, queues, budget if isinstance(budget, int) else budget.params)


def _take(sites: Sequence[Site], queues: Sequence[_Queue], left: int) -> PruningPlan:
    """Remove blocks of units in ascending order while ``left`` covers their cost; of what is needed, one site stays."""
    owners = torch.repeat_interleave(torch.tensor([len(queue.sizes) for queue in queues]))
    order = torch.argsort(torch.cat([torch.empty(0), *(queue.values for queue in queues)]), stable=True)
    taken = [0] * len(queues)
    staying = Counter(queue.one_of for queue in queues)
    for owner in owners[order].tolist():
        queue = queues[owner]
        last = queue.empties and taken[owner] == len(queue.sizes) - 1
        if queue.costs[taken[owner]] > left or (last and queue.one_of and staying[queue.one_of] == 1):
            continue
        left -= queue.costs[taken[owner]]
        taken[owner] += 1
        staying[queue.one_of] -= last
    keep: dict[str, tuple[int, ...]] = {}
    for queue, count in zip(queues, taken, strict=True):
        keep |= queue.keep_after(sum(queue.sizes[:count]))
    return PruningPlan({site.name: keep[site.name] for site in sites})


@dataclass(frozen=True, slots=True)
class _Queue:
    """The units of a site in ascending order, and the blocks of units that may be removed, in that order.

    Where several lots of units must keep the same number (the experts of a layer, the query heads of each key/value
    head), one unit of each lot is removed at a time, ranked by the mean of their values.

    Args:
        lots: site and its units in ascending order, for each lot.
        sizes: how many units of a lot each block of units has.
        costs: what removing each block costs: parameters, or units of all lots.
        values: of each block; low goes first.
        empties: whether the last block leaves the site without units.
        one_of: what the model needs one of; empty where it can do without.
    """

    lots: list[tuple[Site, list[int]]]
    sizes: list[int]
    costs: list[int]
    values: Tensor
    empties: bool
    one_of: str

    @classmethod
    def of(cls, together: Sequence[Site], ranking: Mapping[str, Tensor], min_units: int, *, params: bool) -> _Queue:
        site = together[0]
        multiple, length = site.step, site.units_per_run
        lots, columns = [], []
        for member in together:
            values, order = ranking[member.name].cpu().view(site.runs, length).sort(dim=1, stable=True)
            lots += [(member, (order[run] + run * length).tolist()) for run in range(site.runs)]
            columns.append(values)
        values = torch.cat(columns).mean(dim=0)
        least = max(min_units, 0 if site.removable else site.least)
        floor = math.ceil(math.ceil(least / site.runs) / multiple) * multiple
        removable = values[: max(length - floor, 0)]
        rest = len(removable) % multiple
        means = removable[rest:].view(-1, multiple).mean(dim=1)
        if rest:
            means = torch.cat([removable[:rest].mean().view(1), means])
        sizes = [rest] * bool(rest) + [multiple] * (len(removable) // multiple)
        costs = [size * sum(member.params_per_unit if params else 1 for member, _ in lots) for size in sizes]
        empties = bool(sizes) and not floor
        if empties and params:
            costs[-1] += sum(member.rest for member in together)
        return cls(lots, sizes, costs, means, empties, site.one_of)

    def keep_after(self, removed: int) -> dict[str, tuple[int, ...]]:
        """Return the units that each site keeps when ``removed`` units of each lot are removed."""
        keep: dict[str, list[int]] = {}
        for site, units in self.lots:
            keep.setdefault(site.name, []).extend(units[removed:])
        return {name: tuple(sorted(units)) for name, units in keep.items()}


def _queues(
    sites: Sequence[Site], ranking: Mapping[str, Tensor], min_units: int, *, params: bool = True
) -> list[_Queue]:
    """Queue the units of each site; costs are parameters, or units."""
    return [_Queue.of(together, ranking, min_units, params=params) for together in groups(sites)]


def _possible(queues: Sequence[_Queue]) -> int:
    """Return the cost of all that can be removed: of what the model needs one of, the cheapest last block stays."""
    least: dict[str, list[int]] = {}
    for queue in queues:
        if queue.one_of:
            least.setdefault(queue.one_of, []).append(queue.costs[-1] if queue.empties else 0)
    return sum(sum(queue.costs) for queue in queues) - sum(map(min, least.values()))


def _check_possible(queues: Sequence[_Queue], budget: Budget | int) -> None:
    possible = _possible(queues)
    if isinstance(budget, int):
        if budget > possible:
            names = _named([site for queue in queues for site, _ in queue.lots])
            raise BudgetError(
                f"cannot remove {budget:,} parameters from {names}: {_FLOOR}, at most {possible:,} can be removed"
            )
    elif budget.params > possible:
        largest = math.floor(1e4 * possible / budget.base) / 1e4
        raise BudgetError(
            f"budget.ratio: {budget.ratio} means {budget.params:,} parameters, but {_FLOOR}, at most {possible:,} can "
            f"be removed; the largest ratio of {budget.of} is {largest}"
        )


def _named(sites: Sequence[Site]) -> str:
    """Name one site, or the first and the last of several."""
    return " to ".join(dict.fromkeys((sites[0].name, sites[-1].name))) if sites else "no site"
