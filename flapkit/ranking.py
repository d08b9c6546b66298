"""From scores to a plan: what structure searchers share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flapkit.errors import BudgetError
from flapkit.plan import Budget, PruningPlan
from flapkit.sites import Site, groups


def standardise(scores: Tensor) -> Tensor:
    """Subtract the mean of a site's scores and divide by their standard deviation.

    FLAP (arXiv 2312.11983), equation 7: it makes layers and modules comparable. The deviation is the unbiased one;
    scores that are all equal become zeros.

    Args:
        scores: scores of one site, any shape.

    Returns:
        The z-scores, of the same shape.
    """
    centred = scores - scores.mean()
    if scores.numel() < 2 or not (deviation := scores.std()):
        return torch.zeros_like(scores)
    return centred / deviation


def remove_lowest(
    sites: Sequence[Site],
    ranking: Mapping[str, Tensor],
    budget: Budget,
    min_units: int = 1,
    multiple_of: int = 1,
) -> PruningPlan:
    """Remove the lowest units of all sites together until the budget is met.

    Units go in ascending order, each at the cost of its real parameters. A unit that no longer fits is passed over
    for the cheaper ones after it, so that what is removed falls short of the budget by less than one smallest unit.
    Ties go in the order of the sites, then of the units.

    Args:
        sites: the sites to prune, in the model's order.
        ranking: site name -> one value per unit [units]; low goes first.
        budget: how many parameters to remove.
        min_units: units that every site keeps.
        multiple_of: an MLP's kept width is a multiple of this.

    Returns:
        The units to keep at each site.

    Raises:
        BudgetError: the floors do not allow the budget.
    """
    queues = [_Queue.of(together, ranking, min_units, multiple_of) for together in groups(sites)]
    _check_possible(queues, budget)
    left = budget.params
    owners = torch.repeat_interleave(torch.tensor([len(queue.sizes) for queue in queues]))
    order = torch.argsort(torch.cat([queue.values for queue in queues]), stable=True)
    taken = [0] * len(queues)
    for owner in owners[order].tolist():
        queue = queues[owner]
        size = queue.sizes[taken[owner]] if taken[owner] < len(queue.sizes) else 0
        cost = size * queue.params_per_step
        if cost <= left:
            taken[owner] += 1
            left -= cost
    keep: dict[str, tuple[int, ...]] = {}
    for queue, count in zip(queues, taken, strict=True):
        keep |= queue.kept(sum(queue.sizes[:count]))
    return PruningPlan({site.name: keep[site.name] for site in sites})


@dataclass(frozen=True, slots=True)
class _Queue:
    """The units of a site, ascending, and the blocks of them that may go, in that order.

    Where several lots of units have to keep the same number (the experts of a layer, the query heads of each key/value
    head), one unit of each lot goes at a time, and the mean of their values ranks them.
    """

    lots: list[tuple[Site, list[int]]]
    sizes: list[int]
    values: Tensor

    @classmethod
    def of(cls, together: Sequence[Site], ranking: Mapping[str, Tensor], min_units: int, multiple_of: int) -> _Queue:
        site = together[0]
        multiple = multiple_of if site.kind == "mlp" else 1
        length = site.units // site.runs
        lots, columns = [], []
        for each in together:
            values, order = ranking[each.name].cpu().view(site.runs, length).sort(dim=1, stable=True)
            lots += [(each, (order[run] + run * length).tolist()) for run in range(site.runs)]
            columns.append(values)
        values = torch.cat(columns).mean(dim=0)
        floor = math.ceil(math.ceil(min_units / site.runs) / multiple) * multiple
        removable = values[: max(length - floor, 0)]
        odd = len(removable) % multiple
        means = removable[odd:].view(-1, multiple).mean(dim=1)
        if odd:
            means = torch.cat([removable[:odd].mean().view(1), means])
        return cls(lots, [odd] * bool(odd) + [multiple] * (len(removable) // multiple), means)

    @property
    def params_per_step(self) -> int:
        """Parameters that one unit of each lot saves."""
        return sum(site.params_per_unit for site, _ in self.lots)

    @property
    def params(self) -> int:
        """Parameters that can go."""
        return sum(self.sizes) * self.params_per_step

    def kept(self, removed: int) -> dict[str, tuple[int, ...]]:
        """Return the units that each site keeps once so many of each lot are removed."""
        kept: dict[str, list[int]] = {}
        for site, units in self.lots:
            kept.setdefault(site.name, []).extend(units[removed:])
        return {name: tuple(sorted(units)) for name, units in kept.items()}


def _check_possible(queues: Sequence[_Queue], budget: Budget) -> None:
    possible = sum(queue.params for queue in queues)
    if budget.params > possible:
        largest = math.floor(1e4 * possible / budget.base) / 1e4
        raise BudgetError(
            f"budget.ratio: {budget.ratio} asks for {budget.params:,} parameters, but with every site at its floor "
            f"only {possible:,} can go; the largest ratio of {budget.of} is {largest}"
        )
