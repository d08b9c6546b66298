"""KFAC: the second-order change of the loss when a unit is removed and least squares repairs the rest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flapkit.interfaces import Gram, ImportanceMetric, Site, SiteStatistics
from flapkit_metrics.gradients import GradientProducts
from flapkit_metrics.obs import Ridge, unexplained


class OutputGradient(GradientProducts):
    """Summed products of the loss's gradient at the consumer's output, sum_t g_t g_t' [out_features, out_features]."""

    @staticmethod
    def partner(x: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradients themselves."""
        return gradient


@dataclass(frozen=True)
class KFAC(ImportanceMetric):
    """The error of ``obs``, weighted by the curvature of the loss: ½ tr(G W_u [(C^-1)_uu]^-1 W_u').

    G is the sum over the calibration text of the outer products of the loss's gradients at the consumer's output: the
    Kronecker-factored curvature of the loss, as in LLM Surgeon (van der Ouderaa et al., arXiv 2312.17244). The scores
    are in nats over the calibration text and comparable between layers: use the searcher ``per_parameter`` and the
    compensator ``least_squares``. Needs a backward pass of calibration.
    """

    name = "kfac"
    statistics = (Gram, OutputGradient)

    ridge: Ridge = 1e-3

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every unit; [units, 1]."""
        columns, residual = unexplained(site, stats[Gram].covariance[0], weight, self.ridge)
        weighted = stats[OutputGradient].products.to(columns) @ columns.transpose(1, 2)
        return (weighted * residual.transpose(1, 2)).sum(dim=(1, 2)).view(site.units, 1) / 2
