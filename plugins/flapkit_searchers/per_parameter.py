"""Rank by what a parameter is worth, as the scores say, without standardising them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import Budget, PruningPlan, Site, StructureSearcher, remove_lowest
from flapkit_searchers.options import MinUnits, MultipleOf


@dataclass(frozen=True)
class PerParameter(StructureSearcher):
    """Rank the units of all layers by their score for each parameter that goes with them.

    For scores that compare from layer to layer as they are, in nats of the loss: those of ``kfac``. Others, such as
    ``wifv``, do not: standardise them with ``al_am``.
    """

    name = "per_parameter"

    min_units: MinUnits = 1
    multiple_of: MultipleOf = 1

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Remove the units of the lowest score for a parameter until the budget is met."""
        ranking = {site.name: scores[site.name].sum(dim=1) / site.params_per_unit for site in sites}
        return remove_lowest(sites, ranking, budget, self.min_units, self.multiple_of)
