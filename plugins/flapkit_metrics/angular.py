"""Angular distance: by what angle a layer, or a block, turns the hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from flapkit.interfaces import Angles, ImportanceMetric, Moments, Site, SiteStatistics, column_sums


@dataclass(frozen=True)
class Angular(ImportanceMetric):
    """The mean angle between the hidden states before and after a layer, in units of pi; for the searcher `depth`.

    Gromov et al. (arXiv 2403.17887), equation 7, for one layer and over all tokens; ShortGPT (arXiv 2403.03853) has the
    mean of one minus its cosine, which grows with it. A site's scores add up to the angle; its channels share it by the
    power of what they add to the output, E[x_j^2] |W_:j|^2.
    """

    name = "angular"
    statistics = (Moments, Angles)

    of: Annotated[
        Literal["layer", "block"],
        Field(
            description="The angle of the site's whole layer, or only of its attention or MLP; `block` needs a family "
            "that adds the consumers' outputs to the hidden state unchanged. An expert has the angle of its layer."
        ),
    ] = "layer"

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Return each channel's share of the angle [units, channels_per_unit]."""
        angle = stats[Angles].layer if self.of == "layer" else stats[Angles].block
        power = stats[Moments].second_moment * column_sums(weight, 2)
        total = power.sum()
        shares = power / total if total > 0 else power + 1 / len(power)
        return (angle * shares).view(site.units, -1)
