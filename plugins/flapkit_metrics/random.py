"""Random scores: the floor that any metric must beat."""

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
    """Scores drawn evenly from [0, 1), for whole units. Needs no calibration.

    They depend on the seed and on the site's name alone: neither on the other sites, nor on the device.
    """

    name = "random"

    seed: Annotated[int, Field(ge=0, lt=2**32, description="Seed of the drawing.")] = 0

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every unit; [units, 1]."""
        # The CPU's generator looks at the seed's lower 32 bits alone.
        seed = zlib.crc32(f"{self.seed} {site.name}".encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(site.units, 1, generator=generator, dtype=torch.float64)
