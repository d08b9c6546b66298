"""UL-UM: the same ratio in every layer and module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from flapkit.interfaces import (
    Budget,
    PruningPlan,
    Site,
    StructureSearcher,
    groups,
    layer_ratios,
    raise_attention,
    remove_lowest,
    unit_costs,
    whole_units,
)
from flapkit_searchers.options import AttentionPower, MinUnits


@dataclass(frozen=True)
class ULUM(StructureSearcher):
    """Remove the same ratio of every site, the lowest sums of raw scores first.

    FLAP (arXiv 2312.11983), section 4.4. No site loses more than its ratio: it is rounded down to whole heads, so that
    the model keeps slightly more than the budget says; ``ul_mm`` removes the rest from the MLPs.
    """

    name = "ul_um"

    profile: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...],
        Field(
            description="One ratio per layer, in order; scaled to meet the budget; 0 leaves a layer whole; "
            "empty for the same ratio in every layer."
        ),
    ] = ()
    min_units: MinUnits = 1
    attention_power: AttentionPower = 2.0

    @property
    def uniform(self) -> bool:
        """Whether all layers keep the same sizes."""
        return not self.profile

    def tolerance(self, sites: Sequence[Site], budget: Budget) -> int:
        """Allow one unit at each site, since every site is rounded separately."""
        return sum(unit_costs(sites, budget.cost))

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Remove each site's share of the budget."""
        ratios = layer_ratios(sites, budget, self.profile)
        raised = raise_attention(sites, scores, self.attention_power)
        keep: dict[str, tuple[int, ...]] = {}
        for together in groups(sites):
            units = whole_units(together, ratios[together[0].layer], budget)
            ranking = {site.name: raised[site.name].sum(dim=1) for site in together}
            amount = units * budget.cost.of(together[0])
            keep |= remove_lowest(together, ranking, budget, self.min_units, amount).keep
        return PruningPlan({site.name: keep[site.name] for site in sites})
