"""REAP: how much an expert contributes to the tokens that are routed to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import Contributions, ImportanceMetric, Moments, Site, SiteStatistics
from flapkit_metrics.wifv import WIFV


@dataclass(frozen=True)
class REAP(ImportanceMetric):
    """Whole experts: the mean of router weight times norm of the output, over an expert's tokens. For channels, `wifv`.

    Router-weighted expert activation pruning (REAP, arXiv 2510.13999). The router weight is the one that
    the model applies, with its normalisation and scaling. An expert without tokens scores 0.
    """

    name = "reap"
    statistics = (Moments, Contributions)
    scores_experts = True

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every expert [units, 1], or every channel [units, channels_per_unit]."""
        if site.kind == "mixture":
            return stats[Contributions].mean[:, None]
        return WIFV().score(site, stats, weight)
