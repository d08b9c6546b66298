"""The order in which the units of a site go."""

from __future__ import annotations

import torch
from torch import Tensor

from flapkit.interfaces import Site


def places(site: Site, scores: Tensor) -> Tensor:
    """Return each unit's place among those of its run [units], float64: 0 for the lowest score.

    Args:
        site: the site.
        scores: its scores [units, k].
    """
    runs = scores.double().mean(dim=1).view(site.runs, -1)
    ranks = torch.arange(runs.shape[1], dtype=runs.dtype).expand_as(runs)
    return torch.empty_like(runs).scatter_(1, runs.argsort(dim=1, stable=True), ranks).flatten()
