"""AL-AM: all layers and all modules ranked together, FLAP's structure search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import Budget, PruningPlan, Site, StructureSearcher, raise_attention, remove_lowest, standardise
from flapkit_searchers.options import AttentionPower, MinUnits


@dataclass(frozen=True)
class ALAM(StructureSearcher):
    """Standardise the scores of every site, then rank heads and neurons of all layers together.

    FLAP (arXiv 2312.11983), section 3.3. A head's value is the mean over its channels' z-scores.
    """

    name = "al_am"
    takes_nested = True

    min_units: MinUnits = 1
    attention_power: AttentionPower = 2.0

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Remove the units with the lowest standardised scores until the budget is met."""
        raised = raise_attention(sites, scores, self.attention_power)
        ranking = {name: standardise(values).mean(dim=1) for name, values in raised.items()}
        return remove_lowest(sites, ranking, budget, self.min_units)
