"""Frequency: how often an expert is used."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import Contributions, ImportanceMetric, Moments, Site, SiteStatistics
from flapkit_metrics.wifv import WIFV


@dataclass(frozen=True)
class Frequency(ImportanceMetric):
    """Whole experts: the fraction of the tokens to which an expert contributes. For channels, `wifv`.

    A baseline of REAP (arXiv 2510.13999).
    """

    name = "frequency"
    statistics = (Moments, Contributions)
    scores_experts = True

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every expert [units, 1], or every channel [units, channels_per_unit]."""
        if site.kind == "mixture":
            return stats[Contributions].frequency[:, None]
        return WIFV().score(site, stats, weight)
