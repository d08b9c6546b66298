"""No compensation: the baseline for all compensators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import Compensator, Correction, Site, SiteStatistics


@dataclass(frozen=True)
class NoCompensation(Compensator):
    """Repair nothing."""

    name = "none"

    @property
    def adds_bias(self) -> bool:
        """Always False."""
        return False

    def correct(self, site: Site, stats: SiteStatistics, weight: Tensor, keep: Sequence[int]) -> Correction:
        """Return an empty correction."""
        return Correction()
