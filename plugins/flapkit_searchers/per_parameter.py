"""Rank by score per cost, without standardising the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import Budget, PruningPlan, Site, StructureSearcher, remove_lowest
from flapkit_searchers.options import MinUnits


@dataclass(frozen=True)
class PerParameter(StructureSearcher):
    """Rank the units of all layers by their score per removed parameter, or per whatever else the budget counts.

    For scores that are comparable between layers, such as those of ``kfac`` in nats of the loss. Others, such as those
    of ``wifv``, are not: use ``al_am``, which standardises them.
    """

    name = "per_parameter"
    takes_nested = True

    min_units: MinUnits = 1

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Remove the units with the lowest score per cost until the budget is met."""
        ranking = {site.name: scores[site.name].sum(dim=1) / budget.cost.of(site) for site in sites}
        return remove_lowest(sites, ranking, budget, self.min_units)
