"""OBS: the output of a unit that the other units cannot reproduce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flapkit.interfaces import Gram, ImportanceMetric, Site, SiteStatistics

PENDING = 64
"""Removed channels after which the matrices are updated."""

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
    greedy: Annotated[
        bool,
        Field(
            description="Remove the units one at a time, each with a repair of the rest, and score each by what its "
            "removal adds to the error; units that reproduce each other are not both removed."
        ),
    ] = False

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every unit; [units, 1]."""
        if self.greedy:
            return removed_one_at_a_time(site, stats[Gram].covariance[0], weight, self.ridge)
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
    inverse = inverted(covariance, ridge)
    columns = weight.to(inverse).reshape(site.out_features, site.units, site.channels_per_unit).permute(1, 2, 0)
    solved: Tensor = torch.linalg.solve(unit_blocks(site, inverse), columns)
    return columns, solved


def removed_one_at_a_time(site: Site, covariance: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """Score every unit by what its removal adds to the error, when the lowest goes first and the rest is repaired.

    With P the inverse covariance and M = W'W: tr(M_uu P_uu^-1) is what the removal of u adds. Then p = P_uu^-1 P_u,
    P' = P - P_u' p, and W' = W - W_u p, so that M' = M - p'q - q'p with q = M_u - M_uu p / 2. Both are kept as they
    were some removals ago, less products of few rows, of which only the rows of the next unit are computed.

    Args:
        site: the site.
        covariance: covariance of its channels [channels, channels]; changed in place.
        weight: the consumer's weight [out_features, channels].
        ridge: added to the covariance's diagonal, as a fraction of its mean.

    Returns:
        Scores [units, 1], never lower than those of the units that go before.
    """
    inverse = inverted(covariance, ridge)
    weight = weight.to(inverse)
    products, width = weight.T @ weight, site.channels_per_unit
    inverses, norms = unit_blocks(site, inverse).clone(), unit_blocks(site, products).clone()

    def blocks_of_product(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("wui,wuj->uij", a.view(width, site.units, width), b.view(width, site.units, width))

    scores = weight.new_zeros(site.units)
    gone = torch.zeros(site.units, dtype=torch.bool, device=weight.device)
    rows = weight.new_empty((3, max(width, PENDING // width * width), weight.shape[1]))
    pending, reached = 0, weight.new_zeros(())
    for _ in range(site.units):
        added = torch.linalg.solve(inverses, norms).diagonal(dim1=1, dim2=2).sum(dim=1)
        unit = int(added.masked_fill(gone, float("inf")).argmin())
        own = slice(unit * width, (unit + 1) * width)
        ps, qs, firsts = rows[:, :pending]
        first = inverse[own] - firsts[:, own].T @ ps
        own_products = products[own] - ps[:, own].T @ qs - qs[:, own].T @ ps
        p = torch.linalg.solve(first[:, own], first)
        q = own_products - own_products[:, own] @ p / 2
        reached = torch.maximum(reached, added[unit])
        scores[unit], gone[unit] = reached, True
        rows[:, pending : pending + width] = torch.stack([p, q, first])
        pending += width
        inverses -= blocks_of_product(first, p)
        norms -= blocks_of_product(p, q) + blocks_of_product(q, p)
        inverses[unit] = torch.eye(width, dtype=weight.dtype, device=weight.device)
        if pending == rows.shape[1]:
            ps, qs, firsts = rows
            inverse -= firsts.T @ ps
            products -= ps.T @ qs + qs.T @ ps
            pending = 0
    return scores[:, None]


def inverted(covariance: Tensor, ridge: float) -> Tensor:
    """Return the inverse of a covariance plus a ridge, which is a fraction of its diagonal's mean; changes it."""
    covariance.diagonal().add_(ridge * covariance.diagonal().mean() or 1)
    return torch.cholesky_inverse(torch.linalg.cholesky(covariance))


def unit_blocks(site: Site, matrix: Tensor) -> Tensor:
    """Return the diagonal blocks of a matrix [channels, channels]: [units, channels_per_unit, channels_per_unit]."""
    width = site.channels_per_unit
    return matrix.view(site.units, width, site.units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
