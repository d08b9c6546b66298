"""Knapsack: the plan with the smallest sum of removed scores, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import Budget, PruningPlan, Site, StructureSearcher, remove_cheapest
from flapkit_searchers.options import MinUnits


@dataclass(frozen=True)
class Knapsack(StructureSearcher):
    """Remove the units whose scores have the smallest sum, of all plans that meet the budget to within one unit.

    ``per_parameter`` takes the units in order of their score per cost, which comes close; this solves the knapsack
    exactly. For scores that add up over the model, such as those of ``kfac`` in nats of the loss; those of ``wifv`` do
    not.
    """

    name = "knapsack"

    min_units: MinUnits = 1

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Remove the units with the smallest sum of scores that meet the budget."""
        sums = {name: values.sum(dim=1) for name, values in scores.items()}
        return remove_cheapest(sites, sums, budget, self.min_units)
