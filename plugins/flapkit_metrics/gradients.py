"""Statistics: products with the loss's gradient, summed over the calibration text."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor

from flapkit.interfaces import GradientStatistic, Site


class GradientProducts(GradientStatistic):
    """Sum over tokens of the outer products of the loss's gradient at the consumer's output with another vector.

    Products of a batch are computed in float32, or in the other vector's data type if that is wider, and summed in
    float64. Subclasses define the other vector.

    Args:
        channels: input channels of the consumer.
        out_features: output features of the consumer.
    """

    version = 2

    products: Tensor
    """The sums so far, float64 [out_features, width]."""

    def __init__(self, channels: int, out_features: int) -> None:
        super().__init__(channels)
        none = torch.empty(0, channels), torch.empty(0, out_features)
        empty = torch.zeros(out_features, self.partner(*none).shape[1], dtype=torch.float64)
        self.add_state("products", empty)

    @classmethod
    def of(cls, site: Site) -> Self:
        """Build the empty statistic of a site."""
        return cls(site.channels, site.out_features)

    @staticmethod
    @abstractmethod
    def partner(x: Tensor, gradient: Tensor) -> Tensor:
        """Return the vectors [tokens, width] to multiply the gradients with.

        Args:
            x: the consumer's inputs [tokens, channels].
            gradient: the loss's gradient at the consumer's output [tokens, out_features].
        """

    def update(self, x: Tensor, gradient: Tensor) -> None:  # type: ignore[override]
        """Add the outer products of a batch's tokens."""
        partner = self.partner(x, gradient)
        dtype = torch.promote_types(partner.dtype, torch.float32)
        # Mixed precision would round the products.
        with torch.autocast(partner.device.type, enabled=False):
            self.products += gradient.to(dtype).T @ partner.to(dtype)
