"""WIFV: weighted input-feature variance, FLAP's metric."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import ImportanceMetric, Moments, Site, SiteStatistics, column_sums


@dataclass(frozen=True)
class WIFV(ImportanceMetric):
    """Variance of a channel, times the squared norm of its column: Var(x_j) · ||W_:j||².

    The mean squared error of the output when a channel is replaced by its mean (FLAP, arXiv 2312.11983, equation 5).
    """

    name = "wifv"
    statistics = (Moments,)

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every channel; [units, channels_per_unit]."""
        return (stats[Moments].variance * column_sums(weight, 2)).view(site.units, -1)
