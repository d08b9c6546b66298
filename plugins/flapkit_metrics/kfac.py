"""KFAC: the second-order change of the loss when a unit goes and least squares lets the others take its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from flapkit.interfaces import ImportanceMetric
from flapkit.sites import Site
from flapkit.statistics import GradientStatistic, Gram, SiteStatistics
from flapkit_metrics.obs import Ridge, unexplained


class OutputGradient(GradientStatistic):
    """Summed products of the loss's gradient at the consumer's output, sum_t g_t g_t' [out_features, out_features]."""

    _products: Tensor

    def __init__(self, channels: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        empty = torch.zeros(out_features, out_features, dtype=torch.float64)
        self.add_state("_products", empty, dist_reduce_fx="sum", persistent=True)

    @classmethod
    def of(cls, site: Site) -> Self:
        """Build the empty statistic of a site."""
        return cls(site.channels, site.out_features)

    def update(self, x: Tensor, gradient: Tensor) -> None:  # type: ignore[override]
        """Add the products of gradients [tokens, out_features]."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        with torch.autocast(gradient.device.type, enabled=False):
            self._products += gradient.to(dtype).T @ gradient.to(dtype)

    def compute(self) -> Tensor:
        """Return the products, float64 [out_features, out_features]."""
        return self.products

    @property
    def products(self) -> Tensor:
        """The products, float64 [out_features, out_features]."""
        return self._products

    def is_finite(self) -> bool:
        """Tell whether all that was taken in so far was finite."""
        return bool(torch.isfinite(self._products).all())


@dataclass(frozen=True)
class KFAC(ImportanceMetric):
    """What ``obs`` loses, weighed by how the loss minds it: ½ tr(G W_u [(C^-1)_uu]^-1 W_u').

    G are the products of the loss's gradients at the consumer's output, summed over the calibration text: the
    Kronecker-factored curvature of the loss, as in LLM Surgeon (van der Ouderaa et al., arXiv 2312.17244). The scores
    are nats of the calibration text, and compare from layer to layer as they are: they go with the searcher
    ``per_parameter`` and the compensator ``least_squares``. Needs a backward pass of calibration.
    """

    name = "kfac"
    statistics = (Gram, OutputGradient)

    ridge: Ridge = 1e-3

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every unit; [units, 1]."""
        columns, lost = unexplained(site, stats[Gram].covariance[0], weight, self.ridge)
        minded = stats[OutputGradient].products.to(columns) @ columns.transpose(1, 2)
        return (minded * lost.transpose(1, 2)).sum(dim=(1, 2)).view(site.units, 1) / 2
