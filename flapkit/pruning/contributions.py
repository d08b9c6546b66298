"""What the experts of a mixture contribute."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from flapkit.model.site import Site
from flapkit.pruning.statistics import Statistic


class Contributions(Statistic):
    """How often, and how much, the experts of a mixture contribute; measured at mixtures alone, empty elsewhere.

    A contribution is the router's weight times the norm of the expert's output, or 0 for tokens that are not routed to
    the expert: the input that a mixture's consumer is taken to have.
    """

    total: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        zeros = torch.zeros(channels, dtype=torch.float64)
        self.add_state("total", zeros.new_zeros(1))
        self.add_state("counts", zeros)
        self.add_state("sums", zeros.clone())

    @classmethod
    def of(cls, site: Site) -> Self:
        """Build the empty statistic of a site."""
        return cls(site.channels if site.kind == "mixture" else 0)

    def update(self, x: Tensor) -> None:
        """Add contributions [tokens, experts]."""
        if self.channels:
            self.total = self.total + len(x)
            self.counts = self.counts + (x != 0).sum(dim=0)
            self.sums = self.sums + x.sum(dim=0, dtype=torch.float64)

    @property
    def frequency(self) -> Tensor:
        """Fraction of the tokens to which each expert contributes, float64 [experts]."""
        return self.counts / self.total.clamp(min=1)

    @property
    def mean(self) -> Tensor:
        """Mean of each expert's contributions over the tokens that have one, float64 [experts]; 0 without any."""
        return self.sums / self.counts.clamp(min=1)
