"""Sites by hand, and their statistics from given inputs, for tests of single components."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flapkit.model.component import Component
from flapkit.model.site import Site
from flapkit.pruning.components import needed_statistics
from flapkit.pruning.statistics import SiteStatistics


def site_of(units: int, width: int, out_features: int = 4) -> Site:
    """Describe an MLP of some units, or, where they are wider than a channel, an attention."""
    return Site(
        name="layers.0.site",
        layer=0,
        kind="mlp" if width == 1 else "attention",
        consumer="consumer",
        units=units,
        channels_per_unit=width,
        out_features=out_features,
        couplings=(),
    )


def random_scores(sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """Draw a score for every channel of some sites, the same each time."""
    draw = torch.Generator().manual_seed(0)
    return {
        site.name: torch.rand(site.units, site.channels_per_unit, generator=draw, dtype=torch.float64) for site in sites
    }


def measured(
    x: torch.Tensor, *components: Component, width: int = 1, held_out: torch.Tensor | Sequence[int] = ()
) -> SiteStatistics:
    """Measure what components need from inputs [tokens, channels], some tokens of which are held out."""
    site = site_of(x.shape[1] // width, width)
    statistics = [statistic.of(site) for statistic in needed_statistics(components)]
    marked = torch.zeros(len(x), dtype=torch.bool)
    marked[held_out] = True
    parts = {"all": x, "fitted": x[~marked], "held_out": x[marked]}
    for statistic in statistics:
        statistic.update(parts[statistic.windows])
    return SiteStatistics(statistics)
