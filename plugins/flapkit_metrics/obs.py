"""OBS: the output of a unit that the other units cannot reproduce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flapkit.interfaces import Gram, ImportanceMetric, Site, SiteStatistics

Ridge = Annotated[float, Field(gt=0, description="Added to the covariance's diagonal, as a fraction of its mean.")]


@dataclass(frozen=True)
class OBS(ImportanceMetric):
    """Mean squared error of the output when a unit is removed and least squares repairs the rest.

    tr(W_u [(C^-1)_uu]^-1 W_u'), with C the covariance of all channels: the optimal brain surgeon's saliency (Hassibi
    and Stork, 1993) of a group of columns, as used by SparseGPT (arXiv 2301.00774) for single weights. Use it with the
    compensator ``least_squares``.
    """

    name = "obs"
    statistics = (Gram,)

    ridge: Ridge = 1e-3

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every unit; [units, 1]."""
        columns, residual = unexplained(site, stats[Gram].covariance[0], weight, self.ridge)
        return (columns * residual).sum(dim=(1, 2)).view(site.units, 1)


def unexplained(site: Site, covariance: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return every unit's columns, and their product with the unit's covariance given the other units.

    Args:
        site: the site.
        covariance: covariance of its channels [channels, channels]; changed in place.
        weight: the consumer's weight [out_features, channels].
        ridge: added to the covariance's diagonal, as a fraction of its mean.

    Returns:
        W_u' and [(C^-1)_uu]^-1 W_u', both [units, channels_per_unit, out_features].
    """
    covariance.diagonal().add_(ridge * covariance.diagonal().mean() or 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    width = site.channels_per_unit
    blocks = inverse.view(site.units, width, site.units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.to(inverse).reshape(site.out_features, site.units, width).permute(1, 2, 0)
    solved: Tensor = torch.linalg.solve(blocks, columns)
    return columns, solved
