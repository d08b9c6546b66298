"""Least squares: fit the removed channels' output by the kept channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from flapkit.interfaces import (
    CalibrationError,
    Compensator,
    Correction,
    Gram,
    HeldOutGram,
    HeldOutTargetGram,
    Site,
    SiteStatistics,
    Spread,
    Statistic,
    TargetGram,
)

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The candidates of ``ridge: auto``, as fractions of the kept channels' mean variance."""


@dataclass(frozen=True)
class LeastSquares(Compensator):
    """Fit the removed channels' output by the kept channels, and fold the fit into the consumer.

    With C the covariance of the inputs, m their mean, S the kept and R the removed channels:
    A = C_RS (C_SS + λI)^-1, W' = W_S + W_R A, b' = b + W_R (m_R - A m_S). This minimises E|Wx - W'x_S - b'|² plus a
    ridge on W' - W_S, so that it is never worse than ``bias`` (A = 0) on the calibration text. Without the intercept C
    is E[xx'] and m is 0: no bias is added.

    ``ridge: auto`` fits three quarters of the calibration windows with several ridges, chooses for every site the best
    one on the remaining quarter, and fits all windows with it. If none is better than ``bias`` (without the intercept:
    than no repair) on these windows, the site gets that instead, with a note.
    """

    name = "least_squares"

    intercept: Annotated[bool, Field(description="Add a bias to the consumers.")] = True
    ridge: Annotated[
        Annotated[float, Field(ge=0)] | Literal["auto"],
        Field(
            description="Penalty on changes of the weight, as a fraction of the kept channels' mean variance; `auto` "
            "chooses it for every site on held-out calibration windows, and uses `bias` where that is better."
        ),
    ] = "auto"

    @property
    def adds_bias(self) -> bool:
        """Whether the intercept is on."""
        return self.intercept

    def measures(self) -> tuple[type[Statistic], ...]:
        """Return the statistics to measure: of held-out windows only for ``ridge: auto``."""
        return (Gram, HeldOutGram) if self.ridge == "auto" else (Gram,)

    def measures_in_sequence(self) -> tuple[type[Statistic], ...]:
        """List what must be measured where the earlier sites are pruned already: the same, with targets."""
        return (TargetGram, HeldOutTargetGram) if self.ridge == "auto" else (TargetGram,)

    def correct(self, site: Site, stats: SiteStatistics, weight: Tensor, keep: Sequence[int]) -> Correction:
        """Return the new columns [out_features, kept channels] and, with the intercept, the bias."""
        everything, judge = self._spreads(stats)
        kept = torch.tensor(site.channels_of(keep), device=weight.device)
        dense = weight.to(everything.squares)
        text = _Text.of(everything, dense, intercept=self.intercept)
        if self.ridge != "auto":
            return self._correction(text, text.fit(dense, kept, self.ridge), kept)
        if judge is None or not judge.tokens:
            raise CalibrationError(
                "compensator.ridge: auto needs held-out calibration windows, one in four, and there are none; "
                "use at least four windows, or a ridge such as 0.01"
            )
        fitted = _Text.of(everything.without(judge), dense, intercept=self.intercept)
        held_out = _Text.of(judge, dense, intercept=self.intercept)
        errors = {ridge: held_out.error(fitted, fitted.fit(dense, kept, ridge), kept) for ridge in RIDGES}
        floor = held_out.error(fitted, dense[:, kept], kept)
        best = min(RIDGES, key=errors.__getitem__)
        if errors[best] < floor:
            return self._correction(text, text.fit(dense, kept, best), kept)
        note = (
            f"{'bias' if self.intercept else 'no repair'}, since least squares is not better on held-out text "
            f"(mean squared error {errors[best]:.4g}, compared with {floor:.4g})"
        )
        return replace(self._correction(text, dense[:, kept], kept), weight=None, note=note)

    def _spreads(self, stats: SiteStatistics) -> tuple[Spread, Spread | None]:
        """Return what was seen on all text, and on the held-out windows if that was asked for."""
        whole, part = (TargetGram, HeldOutTargetGram) if TargetGram in stats else (Gram, HeldOutGram)
        return stats[whole].spread, stats[part].spread if part in stats else None

    def _correction(self, text: _Text, weight: Tensor, kept: Tensor) -> Correction:
        return Correction(weight, text.offset(weight, kept) if self.intercept else None)


class _Text(NamedTuple):
    """What is known of inputs x and of targets t, the outputs that are wanted, on some text.

    With no intercept, the products are taken about zero and the means are zeros.

    Args:
        products: E[(x - mean)(x - mean)'] [channels, channels].
        mean: of x [channels].
        wanted: E[(t - target)(x - mean)'] [out_features, channels].
        target: mean of t [out_features].
        power: E|t - target|² [].
    """

    products: Tensor
    mean: Tensor
    wanted: Tensor
    target: Tensor
    power: Tensor

    @classmethod
    def of(cls, spread: Spread, dense: Tensor, *, intercept: bool) -> _Text:
        """Take what was measured; where no targets were, they are the dense consumer's outputs.

        Args:
            spread: of the inputs, and perhaps of the targets after them.
            dense: the consumer's weight [out_features, channels].
            intercept: whether a bias will take care of the means.
        """
        mean = spread.mean.to(dense)
        products = spread.squares[0] / spread.tokens.to(dense)
        if not intercept:
            products, mean = products.addr_(mean, mean), torch.zeros_like(mean)
        x, t = slice(dense.shape[1]), slice(dense.shape[1], None)
        if len(mean) == dense.shape[1]:
            wanted = dense @ products
            return cls(products, mean, wanted, dense @ mean, (wanted * dense).sum())
        return cls(products[x, x], mean[x], products[t, x], mean[t], products[t, t].diagonal().sum())

    def fit(self, dense: Tensor, kept: Tensor, ridge: float) -> Tensor:
        """Return the columns [out_features, kept channels] that fit the targets best."""
        products = self.products[kept][:, kept]
        gap = self.wanted[:, kept] - dense[:, kept] @ products
        return dense[:, kept] + torch.cholesky_solve(gap.mT, _factor(products, ridge)).mT

    def offset(self, weight: Tensor, kept: Tensor) -> Tensor:
        """Return the offset [out_features] that makes the output's mean that of the targets."""
        return self.target - weight @ self.mean[kept]

    def error(self, fitted: _Text, weight: Tensor, kept: Tensor) -> float:
        """Return E|t - weight x - offset|² on this text, for columns and an offset fitted on another text."""
        explained = weight @ self.products[kept][:, kept] - 2 * self.wanted[:, kept]
        shift = self.offset(weight, kept) - fitted.offset(weight, kept)
        return float(self.power + (explained * weight).sum() + shift.square().sum())


def _factor(products: Tensor, ridge: float) -> Tensor:
    """Factorise products plus a ridge; increase the ridge until the factorisation succeeds."""
    scale = products.diagonal().mean() or products.new_ones(())
    ridge = max(ridge, torch.finfo(products.dtype).eps * len(products))
    factor: Tensor
    while True:
        damped = products.clone()
        damped.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
        ridge *= 10
