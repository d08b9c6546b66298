"""Taylor: the first-order change of the loss, from gradients on the calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from flapkit.interfaces import ImportanceMetric, Site, SiteStatistics
from flapkit_metrics.gradients import GradientProducts


class WeightGradient(GradientProducts):
    """Gradient of the summed loss with respect to the consumer's weight, dL/dW = sum_t g_t x_t'.

    Shape [out_features, channels], float64.
    """

    @staticmethod
    def partner(x: Tensor, gradient: Tensor) -> Tensor:
        """Return the consumer's inputs."""
        return x


@dataclass(frozen=True)
class Taylor(ImportanceMetric):
    """First-order change of the loss L when the consumer's weights W are removed: sum_i |W_ij · dL/dW_ij|.

    LLM-Pruner (arXiv 2305.11627), equation 3, its ``param_first`` without the second-order term; the form ``vector``
    is |sum_i W_ij · dL/dW_ij|, its ``vectorize``, for a whole column (equation 2). L is the cross-entropy of the next
    token summed over the calibration text, so gradients of different windows may cancel, as in LLM-Pruner.

    LLM-Pruner sums these terms over all matrices of a group: the rows of q, k, v or of gate and up, and the consumer's
    columns. Here only the consumer's columns count, as in FLAP's metrics: every family has them, and the calibration
    hooks see them. The difference is small. A column's ``vector`` is |sum_t x_tj · dL/dx_tj|, the first-order change
    when the channel is removed; since a channel is linear in its up row, and a head in its values, the sums of those
    rows give the same number again.

    The scores of different layers differ by orders of magnitude; searchers standardise them. Needs a backward pass of
    calibration, and a float64 copy of every consumer's weight.
    """

    name = "taylor"
    statistics = (WeightGradient,)

    form: Annotated[
        Literal["element", "vector"],
        Field(description="Take the absolute value of each weight's term, or of the column's sum."),
    ] = "element"

    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score every channel; [units, channels_per_unit]."""
        terms = weight.double() * stats[WeightGradient].products
        scores = terms.sum(dim=0).abs() if self.form == "vector" else terms.abs().sum(dim=0)
        return scores.view(site.units, -1)
