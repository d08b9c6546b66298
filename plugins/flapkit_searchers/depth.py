"""Depth: whole layers go, or whole attentions and MLPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from flapkit.interfaces import Budget, BudgetError, PruningPlan, Site, StructureSearcher, remove_lowest
from flapkit_searchers.order import places


@dataclass(frozen=True)
class Depth(StructureSearcher):
    """Remove whole layers, or whole attentions and MLPs, those with the lowest sums of scores first.

    With the metric `angular` this is ShortGPT (arXiv 2403.03853), or Gromov et al. (arXiv 2403.17887) for layers that
    need not be neighbours: a baseline for searchers that choose single heads and neurons. To meet the budget to within
    one unit, the last layer or block loses only its units with the lowest scores; if a head is larger than the rest of
    the budget, neurons of the next one are removed instead. One attention and one MLP stay.
    """

    name = "depth"

    remove: Annotated[
        Literal["layers", "blocks"],
        Field(
            description="What is removed: layers, by the mean of their sites' sums, or single attentions and MLPs, by "
            "their own sum (metric `{name: angular, of: block}`)."
        ),
    ] = "layers"

    def removes_blocks(self, sites: Sequence[Site]) -> bool:
        """Tell whether any attention or MLP can go altogether."""
        return any(site.removable for site in sites)

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Remove the lowest layers or blocks until the budget is met.

        Raises:
            BudgetError: a layer cannot be removed whole, such as one with experts.
        """
        staying = [site.name for site in sites if not site.removable]
        if staying and self.remove == "layers":
            raise BudgetError(
                f"depth: {staying[0]} cannot be removed whole, and so neither can its layer; set `remove: blocks` to "
                "remove other attentions and MLPs, or choose another searcher"
            )
        sums = {site.name: float(scores[site.name].sum()) for site in sites}
        members: dict[str | int, list[Site]] = {}
        for site in sites:
            members.setdefault(site.layer if self.remove == "layers" else site.group or site.name, []).append(site)
        # What cannot be removed whole comes last.
        ascending = sorted(
            members.values(),
            key=lambda part: (not part[0].removable, sum(sums[site.name] for site in part) / len(part)),
        )
        ranking = {
            site.name: place + places(site, scores[site.name]) / site.units_per_run
            for place, part in enumerate(ascending)
            for site in part
        }
        return remove_lowest(sites, ranking, budget, min_units=0)
