"""UL-MM: the same ratio in every layer, split between attention and MLP by a number of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from flapkit.interfaces import (
    Budget,
    BudgetError,
    PruningPlan,
    Site,
    StructureSearcher,
    raise_attention,
    remove_lowest,
    remove_units,
    split_modules,
    unit_costs,
    whole_units,
)
from flapkit_searchers.options import AttentionPower, MinUnits


@dataclass(frozen=True)
class ULMM(StructureSearcher):
    """Remove the same ratio of every layer, the lowest sums of raw scores first; `heads` splits it.

    FLAP (arXiv 2312.11983), section 4.4. The MLP loses the rest of the layer's ratio. The released code's
    ``remove_heads`` is the number for all layers together: ``heads`` times the layers.
    """

    name = "ul_mm"

    heads: Annotated[
        int | None,
        Field(
            ge=0,
            description="Heads to remove from every layer; under grouped-query attention these are KV heads with "
            "their query heads. By default as many whole heads as the layer's ratio allows.",
        ),
    ] = None
    min_units: MinUnits = 1
    attention_power: AttentionPower = 2.0

    @property
    def uniform(self) -> bool:
        """Whether all layers keep the same sizes."""
        return True

    def tolerance(self, sites: Sequence[Site], budget: Budget) -> int:
        """Allow one unit at each site, since every layer is rounded separately."""
        return sum(unit_costs(sites, budget.cost))

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Remove each layer's share of the budget."""
        attention, mlp = split_modules(sites, budget)
        raised = raise_attention(sites, scores, self.attention_power)
        sums = {name: values.sum(dim=1) for name, values in raised.items()}
        ratio = budget.amount / budget.cost.of_all(sites)
        keep: dict[str, tuple[int, ...]] = {}
        for layer in dict.fromkeys(site.layer for site in sites):
            heads, neurons = ([site for site in module if site.layer == layer] for module in (attention, mlp))
            keep |= self._search_layer(heads, neurons, sums, ratio, budget)
        return PruningPlan({site.name: keep[site.name] for site in sites})

    def _search_layer(
        self,
        attention: Sequence[Site],
        mlp: Sequence[Site],
        sums: Mapping[str, Tensor],
        ratio: float,
        budget: Budget,
    ) -> dict[str, tuple[int, ...]]:
        """Remove the heads of one layer, then neurons until its ratio is met."""
        cost = budget.cost
        heads = whole_units(attention, ratio, budget) if self.heads is None else self.heads
        kept = remove_units(attention, sums, heads, self.min_units)
        left = round(ratio * cost.of_all([*attention, *mlp])) - cost.removed(attention, kept)
        if left < 0:
            raise BudgetError(
                f"ul_mm: removing {heads} of the heads exceeds the budget of layer {attention[0].layer}; set fewer"
            )
        neurons = remove_lowest(mlp, sums, budget, self.min_units, left) if mlp else PruningPlan()
        return {**kept.keep, **neurons.keep}
