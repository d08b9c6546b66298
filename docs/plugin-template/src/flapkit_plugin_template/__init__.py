"""A metric for flapkit: how much a channel contributes on average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from flapkit import hookimpl
from flapkit.interfaces import ImportanceMetric, Moments, Site, SiteStatistics


@dataclass(frozen=True)
class MeanOutput(ImportanceMetric):
    """Norm of what a channel adds to the output on average: |mean(x_j)| · ||W_:j||."""

    name = "mean_output"
    statistics = (Moments,)

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every channel; [units, channels_per_unit]."""
        return (stats[Moments].mean.abs() * weight.double().norm(dim=0)).view(site.units, -1)


@hookimpl
def flapkit_metrics() -> Iterable[type[ImportanceMetric]]:
    """Offer the metric."""
    return [MeanOutput]
