"""IFV: input-feature variance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import ImportanceMetric, Moments, Site, SiteStatistics


@dataclass(frozen=True)
class IFV(ImportanceMetric):
    """Variance of a channel: Var(x_j).

    WIFV without the weight, in the ablation of FLAP (arXiv 2312.11983, section 4.4).
    """

    name = "ifv"
    statistics = (Moments,)

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every channel; [units, channels_per_unit]."""
        return stats[Moments].variance.view(site.units, -1)
