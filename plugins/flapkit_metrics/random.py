"""Random scores: the baseline for all metrics."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flapkit.interfaces import ImportanceMetric, Site, SiteStatistics


@dataclass(frozen=True)
class Random(ImportanceMetric):
    """Scores drawn uniformly from [0, 1), for whole units. Needs no calibration.

    They depend only on the seed and the site's name, not on the other sites or the device.
    """

    name = "random"
    scores_experts = True

    seed: Annotated[int, Field(ge=0, lt=2**32, description="Seed of the scores.")] = 0

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every unit; [units, 1]."""
        # The CPU's generator uses only the lower 32 bits of the seed.
        seed = zlib.crc32(f"{self.seed} {site.name}".encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(site.units, 1, generator=generator, dtype=torch.float64)
