"""Wanda-sp: Wanda's score for structured pruning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import ImportanceMetric, Moments, Site, SiteStatistics, column_sums


@dataclass(frozen=True)
class WandaSP(ImportanceMetric):
    """Wanda's score summed over a unit's columns: sum_ij |W_ij| · sqrt(E[x_j²]).

    A baseline of FLAP (arXiv 2312.11983, section 4.1), after Wanda (arXiv 2306.11695, equation 1), whose ||x_j|| is
    the root of the mean here: a constant factor. The whole baseline is this metric, the searcher ``ul_um`` and the
    compensator ``none``. For an MLP the ranking is that of ``wifn``; a head has one score, not one for each channel,
    so that a searcher's ``attention_power`` does not change the order within a layer.
    """

    name = "wanda_sp"
    statistics = (Moments,)

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every unit; [units, 1]."""
        channels = column_sums(weight, 1) * stats[Moments].second_moment.sqrt()
        return channels.view(site.units, -1).sum(dim=1, keepdim=True)
