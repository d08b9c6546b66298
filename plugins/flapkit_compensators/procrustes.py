"""Orthogonal Procrustes: rotate the consumer's output towards what it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flapkit.interfaces import Compensator, Correction, Gram, Site, SiteStatistics, Statistic, TargetGram


@dataclass(frozen=True)
class Procrustes(Compensator):
    """Rotate the output of the kept channels: W' = Q W_S, where Q is the orthogonal matrix that fits best.

    RCPU (arXiv 2510.07782), with a penalty. With C the covariance of the inputs, m their mean, and S the kept channels:
    Q = U V' of the singular value decomposition U Σ V' of W C_:S W_S' + λ W_S W_S', and b' = W m - Q W_S m_S. This
    minimises E|Wx - W'x_S - b'|² + λ |W' - W_S|² over all Q that are orthogonal, so that it is never worse than
    ``bias`` (Q = I) on the calibration text. Without the intercept C is E[xx'] and m is 0: no bias is added. The paper
    has λ = 0; a penalty is better with few windows, where directions that the text hardly shows would turn at random.

    In a sequential repair the targets take the place of the dense outputs Wx.
    """

    name = "procrustes"

    intercept: Annotated[bool, Field(description="Add a bias to the consumers.")] = True
    ridge: Annotated[
        float,
        Field(
            ge=0,
            description="Penalty on changes of the weight, as a fraction of the kept channels' mean variance; the "
            "larger it is, the smaller the rotation.",
        ),
    ] = 1.0

    @property
    def adds_bias(self) -> bool:
        """Whether the intercept is on."""
        return self.intercept

    def measures(self) -> tuple[type[Statistic], ...]:
        """Return the statistics to measure."""
        return (Gram,)

    def measures_in_sequence(self) -> tuple[type[Statistic], ...]:
        """List what must be measured where the earlier sites are pruned already: the same, with targets."""
        return (TargetGram,)

    def correct(self, site: Site, stats: SiteStatistics, weight: Tensor, keep: Sequence[int]) -> Correction:
        """Return the rotated columns [out_features, kept channels] and, with the intercept, the bias."""
        in_sequence = TargetGram in stats
        spread = stats[TargetGram if in_sequence else Gram].spread
        kept = torch.tensor(site.channels_of(keep), dtype=torch.long, device=weight.device)
        products, mean = spread.squares[0] / spread.tokens.to(spread.squares), spread.mean.to(spread.squares)
        if not self.intercept:
            products = products.addr(mean, mean)
            mean = torch.zeros_like(mean)
        dense, channels = weight.to(products.dtype), site.channels
        left = dense[:, kept]
        # The products of the wanted outputs and the kept inputs [out_features, kept channels].
        wanted = products[channels:, kept] if in_sequence else dense @ products[:channels, kept]
        target = mean[channels:] if in_sequence else dense @ mean
        if not keep:
            return Correction(bias=target if self.intercept else None)
        penalty = self.ridge * products.diagonal()[kept].mean()
        before, _, after = torch.linalg.svd((wanted + penalty * left) @ left.T)
        rotated = before @ (after @ left)
        return Correction(rotated, target - rotated @ mean[kept] if self.intercept else None)
