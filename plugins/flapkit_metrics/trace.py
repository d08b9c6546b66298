"""Trace: the variance of a whole unit's output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import ImportanceMetric, Site, SiteStatistics, UnitGram


@dataclass(frozen=True)
class Trace(ImportanceMetric):
    """Mean squared error of the output when a unit is replaced by its mean: tr(W_u C_uu W_u').

    C_uu is the covariance of the unit's channels. For an MLP, whose units are single channels, this is ``wifv``; a
    head's score differs from the sum of its channels' ``wifv`` by their covariances.
    """

    name = "trace"
    statistics = (UnitGram,)

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every unit; [units, 1]."""
        covariance = stats[UnitGram].covariance.double()
        columns = weight.double().view(site.out_features, site.units, -1).transpose(0, 1)
        return ((columns @ covariance) * columns).sum(dim=(1, 2)).view(site.units, 1)
