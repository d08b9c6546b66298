"""AL-AM: all layers and all modules ranked together, FLAP's own structure search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from flapkit.interfaces import StructureSearcher
from flapkit.plan import Budget, PruningPlan
from flapkit.ranking import remove_lowest, standardise
from flapkit.sites import Site


@dataclass(frozen=True)
class ALAM(StructureSearcher):
    """Standardise the scores of every site, then rank heads and neurons of all layers together.

    FLAP (arXiv 2312.11983), section 3.3. A head's value is the mean over its channels' z-scores.
    """

    name = "al_am"

    min_units: Annotated[int, Field(ge=1, description="Units (heads, neurons) that every site keeps.")] = 1
    attention_power: Annotated[
        float,
        Field(gt=0, description="Attention scores are raised to this power: 2 in the released code, 1 in the paper."),
    ] = 2.0
    multiple_of: Annotated[int, Field(ge=1, description="A pruned MLP's width is a multiple of this.")] = 1

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Remove the units of the lowest standardised score until the budget is met."""
        ranking = {site.name: self._standardised(site, scores[site.name]) for site in sites}
        return remove_lowest(sites, ranking, budget, self.min_units, self.multiple_of)

    def _standardised(self, site: Site, scores: Tensor) -> Tensor:
        """Turn scores [units, k] into comparable values [units]."""
        if site.kind == "attention":
            scores = scores.sign() * scores.abs().pow(self.attention_power)
        return standardise(scores).mean(dim=1)
