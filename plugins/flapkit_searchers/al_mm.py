"""AL-MM: heads of all layers ranked together, and neurons likewise; a number of heads splits the budget."""

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
    standardise,
    whole_units,
)
from flapkit_searchers.options import AttentionPower, MinUnits


@dataclass(frozen=True)
class ALMM(StructureSearcher):
    """Rank the heads of all layers together, and all neurons together; `heads` splits the budget between the two.

    FLAP (arXiv 2312.11983), section 4.4, with the scores standardised as in ``al_am``. The released code's
    ``remove_heads`` is the number for all layers together: ``heads`` times the layers.
    """

    name = "al_mm"

    heads: Annotated[
        float | None,
        Field(
            ge=0,
            description="Heads to remove per layer, on average; under grouped-query attention these "
            "are KV heads with their query heads. By default as many as the budget's ratio allows.",
        ),
    ] = None
    min_units: MinUnits = 1
    attention_power: AttentionPower = 2.0

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Remove the lowest heads, then the lowest neurons until the budget is met."""
        attention, mlp = split_modules(sites, budget)
        raised = raise_attention(sites, scores, self.attention_power)
        ranking = {name: standardise(values).mean(dim=1) for name, values in raised.items()}
        heads = whole_units(attention, budget.amount / budget.cost.of_all(sites), budget)
        if self.heads is not None:
            heads = round(self.heads * len(attention))
        keep = remove_units(attention, ranking, heads, self.min_units)
        left = budget.amount - budget.cost.removed(attention, keep)
        if left < 0:
            raise BudgetError(
                f"al_mm: removing {heads} of the heads exceeds the budget of {budget.cost.say(budget.amount)}; "
                "set fewer"
            )
        neurons = remove_lowest(mlp, ranking, budget, self.min_units, left) if mlp else PruningPlan()
        kept = {**keep.keep, **neurons.keep}
        return PruningPlan({site.name: kept[site.name] for site in sites})
