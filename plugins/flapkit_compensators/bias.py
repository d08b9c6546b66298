"""Bias compensation, FLAP's repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flapkit.interfaces import Compensator, Correction, Moments, Site, SiteStatistics, float64_rows


@dataclass(frozen=True)
class Bias(Compensator):
    """Add the removed channels' mean output to the bias: b' = b + W_:R m_R.

    FLAP (arXiv 2312.11983), equation 4. Exact for a channel that is constant.
    """

    name = "bias"
    statistics = (Moments,)

    def correct(self, site: Site, stats: SiteStatistics, weight: Tensor, keep: Sequence[int]) -> Correction:
        """Return the removed channels' mean output [out_features]; the kept columns do not change."""
        removed = stats[Moments].mean.clone()
        removed[site.channels_of(keep)] = 0
        return Correction(bias=torch.cat([rows @ removed for rows in float64_rows(weight)]))
