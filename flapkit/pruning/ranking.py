"""From scores to a plan: functions that structure searchers share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flapkit.model.budget import Budget, Cost, nested_costs
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, groups
from flapkit.system.errors import BudgetError, InputError
from flapkit.system.sizes import counted

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
        BudgetError: the budget's base leaves one of the two empty, so that it cannot be split between them.
    """
    attention = [site for site in sites if site.kind == "attention"]
    mlp = [site for site in sites if site.kind != "attention"]
    if not budget.asked and not (attention and mlp):
        raise BudgetError(
            f"budget.of: {budget.of} leaves {'no MLP' if attention else 'no attention'} to prune, and this searcher "
            "splits the budget between the two; choose `blocks`, or another searcher"
        )
    return attention, mlp


def whole_units(sites: Sequence[Site], ratio: float, budget: Budget) -> int:
    """Return how many whole units, all of one size, a ratio of the sites' cost amounts to."""
    cost = budget.cost.of_all(sites)
    return round(ratio * cost) * sum(site.units for site in sites) // max(cost, 1)


def layer_ratios(sites: Sequence[Site], budget: Budget, profile: Sequence[float] = ()) -> dict[int, float]:
    """Divide a budget among the layers.

    Args:
        sites: the pruned sites.
        budget: how much to remove.
        profile: relative ratios of the layers, in order; empty for equal ratios.

    Returns:
        Layer -> the fraction of its sites' cost to remove; together they meet the budget.

    Raises:
        BudgetError: the profile has the wrong length, is all zero, or removes more than a whole layer.
    """
    costs: dict[int, int] = {}
    for site in sites:
        costs[site.layer] = costs.get(site.layer, 0) + budget.cost.of_all([site])
    if profile and (len(profile) != len(costs) or not any(profile)):
        shown = ", ".join(f"{ratio:g}" for ratio in profile)
        raise BudgetError(f"profile: expected {len(costs)} ratios, one per layer and not all 0, got {shown}")
    weights = dict(zip(costs, profile or [1.0] * len(costs), strict=True))
    total = sum(weight * costs[layer] for layer, weight in weights.items())
    ratios = {layer: weight * budget.amount / total for layer, weight in weights.items()}
    for layer, ratio in ratios.items():
        if ratio > 1:
            raise BudgetError(
                f"profile: scaled to the budget, it removes {ratio:.0%} of layer {layer}; lower the ratio or the budget"
            )
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
        budget: how much to remove.
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
        due += ratio * budget.cost.of_all(members)
        plan = remove_lowest(members, ranking, budget, min_units, round(due) if ratio else 0)
        due -= budget.cost.removed(members, plan)
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
    queues = _queues(sites, ranking, min_units)
    prices = _Prices(queues, [[size * len(queue.lots) for size in queue.sizes] for queue in queues])
    possible = prices.possible()
    if count > possible:
        raise BudgetError(
            f"cannot remove {counted(count, 'unit')} from {_named(sites)}: {_FLOOR}, at most {possible} can be removed"
        )
    return _take(sites, queues, count, prices)


def remove_lowest(
    sites: Sequence[Site],
    ranking: Mapping[str, Tensor],
    budget: Budget,
    min_units: int = 1,
    amount: int | None = None,
) -> PruningPlan:
    """Remove the lowest units of all sites together until the budget is met.

    Units are removed in ascending order; each counts as what it costs in the budget's measure. A unit that no longer
    fits is skipped in favour of cheaper ones after it, so that the result falls short of the budget by less than the
    cheapest unit. Ties are broken by the order of the sites, then of the units. Where whole experts go and channels of
    those that stay, an expert counts with the channels that it has left, and channels with the experts that are left.

    Args:
        sites: the sites to prune, in the model's order.
        ranking: site name -> one value per unit [units]; low goes first.
        budget: how much to remove.
        min_units: units that every site keeps.
        amount: how much to remove instead, as a part of the budget that these sites get.

    Returns:
        The units to keep at each site.

    Raises:
        BudgetError: ``min_units`` does not allow the budget.
    """
    queues = _queues(sites, ranking, min_units)
    prices = _Prices.of(queues, sites, budget.cost)
    _check_possible(sites, prices.possible(), budget, amount)
    return _take(sites, queues, budget.amount if amount is None else amount, prices)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of units that sites lose one after the other: those that keep the same number lose them together.

    Args:
        values: the sum of each block's ranking, ascending where the blocks have the same size.
        costs: what each block costs.
    """

    values: tuple[float, ...]
    costs: tuple[int, ...]


def blocks_of(sites: Sequence[Site], ranking: Mapping[str, Tensor], budget: Budget, min_units: int = 1) -> list[Blocks]:
    """Divide the units that may go into blocks, for each group of sites that keep the same number of units.

    Of what the model needs one of, every site keeps its last block.
    """
    divided = []
    for queue in _queues(sites, ranking, min_units):
        count = len(queue.sizes) - int(queue.empties and bool(queue.one_of))
        sums = queue.values * torch.tensor(queue.sizes) * len(queue.lots)
        divided.append(Blocks(tuple(sums.tolist())[:count], tuple(queue.costs(budget.cost))[:count]))
    return divided


def remove_blocks(
    sites: Sequence[Site], ranking: Mapping[str, Tensor], taken: Sequence[int], min_units: int = 1
) -> PruningPlan:
    """Remove a number of the blocks of each group of sites, the first ones of ``blocks_of``."""
    return _keep(sites, _queues(sites, ranking, min_units), taken)


def _take(sites: Sequence[Site], queues: Sequence[_Queue], left: int, prices: _Prices) -> PruningPlan:
    """Remove blocks of units in ascending order while ``left`` covers their cost; of what is needed, one site stays.

    Args:
        sites: the sites.
        queues: their units.
        left: how much may go.
        prices: what each block costs.
    """
    owners = torch.repeat_interleave(torch.tensor([len(queue.sizes) for queue in queues]))
    order = torch.argsort(torch.cat([torch.empty(0), *(queue.values for queue in queues)]), stable=True)
    taken = [0] * len(queues)
    staying = Counter(queue.one_of for queue in queues)
    for owner in owners[order].tolist():
        queue = queues[owner]
        if taken[owner] == len(queue.sizes):
            continue
        cost, last = prices.next(owner, taken), queue.empties and taken[owner] == len(queue.sizes) - 1
        if cost > left or (last and queue.one_of and staying[queue.one_of] == 1):
            continue
        left -= cost
        taken[owner] += 1
        staying[queue.one_of] -= last
    return _keep(sites, queues, taken)


def _keep(sites: Sequence[Site], queues: Sequence[_Queue], taken: Sequence[int]) -> PruningPlan:
    """Remove a number of the blocks of each queue."""
    keep: dict[str, tuple[int, ...]] = {}
    for queue, count in zip(queues, taken, strict=True):
        keep |= queue.keep_after(sum(queue.sizes[:count]))
    return PruningPlan({site.name: keep[site.name] for site in sites}).emptied(sites)


@dataclass(frozen=True, slots=True)
class _Queue:
    """The units of a site in ascending order, and the blocks of units that may be removed, in that order.

    Where several lots of units must keep the same number (the experts of a layer, the query heads of each key/value
    head), one unit of each lot is removed at a time, ranked by the mean of their values.

    Args:
        lots: site and its units in ascending order, for each lot.
        sizes: how many units of a lot each block of units has.
        values: of each block; low goes first.
        empties: whether the last block leaves the site without units.
        one_of: what the model needs one of; empty where it can do without.
    """

    lots: list[tuple[Site, list[int]]]
    sizes: list[int]
    values: Tensor
    empties: bool
    one_of: str

    @classmethod
    def of(cls, together: Sequence[Site], ranking: Mapping[str, Tensor], min_units: int) -> _Queue:
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
        return cls(lots, sizes, means, bool(sizes) and not floor, site.one_of)

    def costs(self, cost: Cost) -> list[int]:
        """Return the cost of each block: the first pays for the correction; the rest of the site goes with the last."""
        sites = {site.name: site for site, _ in self.lots}.values()
        step = sum(cost.of(site) for site, _ in self.lots)
        costs = [size * step for size in self.sizes]
        if costs:
            costs[0] -= cost.added_at(sites)
        if self.empties:
            costs[-1] += cost.rest_at(sites)
        return costs

    def keep_after(self, removed: int) -> dict[str, tuple[int, ...]]:
        """Return the units that each site keeps when ``removed`` units of each lot are removed."""
        keep: dict[str, list[int]] = {}
        for site, units in self.lots:
            keep.setdefault(site.name, []).extend(units[removed:])
        return {name: tuple(sorted(units)) for name, units in keep.items()}


@dataclass(frozen=True, slots=True)
class _Prices:
    """What the next block of each queue costs.

    Args:
        queues: the queues.
        costs: for each queue, what each of its blocks costs while no expert is gone.
        experts: queue of a mixture -> that of its experts.
        channels: queue of a mixture -> what all channels of one of its experts cost.
    """

    queues: Sequence[_Queue]
    costs: Sequence[Sequence[int]]
    experts: Mapping[int, int] = field(default_factory=dict)
    channels: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, queues: Sequence[_Queue], sites: Sequence[Site], cost: Cost) -> _Prices:
        nested = nested_costs(sites, cost)
        first = [queue.lots[0][0] for queue in queues]
        mixtures = {site.name: index for index, site in enumerate(first) if site.name in nested}
        experts = {mixtures[site.within]: index for index, site in enumerate(first) if site.within in mixtures}
        channels = {index: nested[name] for name, index in mixtures.items()}
        return cls(queues, [queue.costs(cost) for queue in queues], experts, channels)

    def next(self, index: int, taken: Sequence[int]) -> int:
        """Return the cost of a queue's next block.

        Args:
            index: the queue.
            taken: for each queue, how many blocks are gone.
        """
        price = self.costs[index][taken[index]]
        if index in self.experts:
            # A whole expert goes with the channels that it has left, and with the bias that replaces the others.
            of_experts = self.experts[index]
            gone = sum(self.costs[of_experts][: taken[of_experts]]) // len(self.queues[of_experts].lots)
            return price + len(self.queues[index].lots) * (self.channels[index] - gone)
        for mixture, of_experts in self.experts.items():
            if of_experts == index:
                return self._of_those_left(price, mixture, taken[mixture])
        return price

    def possible(self) -> int:
        """Return the cost of all that can be removed: of what the model needs one of, the cheapest last block stays."""
        least: dict[str, list[int]] = {}
        for queue, costs in zip(self.queues, self.costs, strict=True):
            if queue.one_of:
                least.setdefault(queue.one_of, []).append(costs[-1] if queue.empties else 0)
        sums = [sum(costs) for costs in self.costs]
        for mixture, of_experts in self.experts.items():
            count = len(self.costs[mixture])
            sums[mixture] += count * len(self.queues[mixture].lots) * self.channels[mixture]
            sums[of_experts] = self._of_those_left(sums[of_experts], mixture, count)
        return sum(sums) - sum(map(min, least.values()))

    def _of_those_left(self, price: int, mixture: int, taken: int) -> int:
        """Return what is left of the cost of some channels of all experts when blocks of these are gone."""
        experts = len(self.queues[self.experts[mixture]].lots)
        return price // experts * (experts - taken * len(self.queues[mixture].lots))


def _queues(sites: Sequence[Site], ranking: Mapping[str, Tensor], min_units: int) -> list[_Queue]:
    """Queue the units of each site."""
    return [_Queue.of(together, ranking, min_units) for together in groups(sites)]


def _check_possible(
    sites: Sequence[Site],
    possible: int,
    budget: Budget,
    amount: int | None,
) -> None:
    if amount is not None:
        if amount > possible:
            raise BudgetError(
                f"cannot remove {budget.cost.say(amount)} from {_named(sites)}: {_FLOOR}, at most "
                f"{budget.cost.count(possible)} can be removed"
            )
    elif budget.amount > possible:
        raise BudgetError(
            f"{budget}, but {_FLOOR}, at most {budget.cost.count(possible)} can be removed; {budget.limit(possible)}"
        )


def _named(sites: Sequence[Site]) -> str:
    """Name one site, or the first and the last of several."""
    return " to ".join(dict.fromkeys((sites[0].name, sites[-1].name))) if sites else "no site"
