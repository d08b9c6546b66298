"""Statistics: products with the loss's gradient, summed over the calibration text."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from flapkit.interfaces import GradientStatistic, Site


class GradientProducts(GradientStatistic):
    """Sum over tokens of the outer products of the loss's gradient at the consumer's output with another vector.

    Products of a batch are computed in float32, or in the other vector's data type if that is wider, and summed in
    float64. Subclasses define the other vector.

    Args:
        channels: input channels of the consumer.
        out_features: output features of the consumer.
    """

    _products: Tensor

    def __init__(self, channels: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        none = torch.empty(0, channels), torch.empty(0, out_features)
        empty = torch.zeros(out_features, self.partner(*none).shape[1], dtype=torch.float64)
        self.add_state("_products", empty, dist_reduce_fx="sum", persistent=True)

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
            self._products += gradient.to(dtype).T @ partner.to(dtype)

    def compute(self) -> Tensor:
        """Return the products, float64 [out_features, width]."""
        return self._products

    def is_finite(self) -> bool:
        """Return whether all sums so far are finite."""
        return bool(torch.isfinite(self._products).all())
