"""Magnitude: the size of the weights alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import ImportanceMetric, Site, SiteStatistics, column_sums


@dataclass(frozen=True)
class Magnitude(ImportanceMetric):
    """Euclidean norms of a unit's columns, summed: sum_j ||W_:j||; for a whole expert, that of its last weight.

    Needs no calibration.

    The magnitude baseline (Mag-SP) of FLAP's released code, with the searcher ``ul_um`` and the compensator ``none``.
    """

    name = "magnitude"
    scores_experts = True

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every unit; [units, 1]."""
        return column_sums(weight, 2).sqrt().view(site.units, -1).sum(dim=1, keepdim=True)
