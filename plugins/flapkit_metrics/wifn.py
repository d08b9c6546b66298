"""WIFN: weighted input-feature norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import ImportanceMetric, Moments, Site, SiteStatistics, column_sums


@dataclass(frozen=True)
class WIFN(ImportanceMetric):
    """Mean absolute weight of a column, times the channel's root mean square: mean_i |W_ij| · sqrt(E[x_j²]).

    Wanda's score (arXiv 2306.11695, equation 1) averaged over a column, in the ablation of FLAP (arXiv 2312.11983,
    section 4.4). It measures the size of the input, not its variance around a constant.
    """

    name = "wifn"
    statistics = (Moments,)

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every channel; [units, channels_per_unit]."""
        return (column_sums(weight, 1) / len(weight) * stats[Moments].second_moment.sqrt()).view(site.units, -1)
