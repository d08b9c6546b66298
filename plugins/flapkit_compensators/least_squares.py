"""Least squares: the kept channels take over what they can of the removed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from flapkit.errors import CalibrationError
from flapkit.interfaces import Compensator, Correction
from flapkit.sites import Site
from flapkit.statistics import Gram, HeldOutGram, SiteStatistics, Spread, Statistic

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""What ``ridge: auto`` chooses from, as parts of the kept channels' mean variance."""


@dataclass(frozen=True)
class LeastSquares(Compensator):
    """Fit the removed channels' output by the kept channels, and fold the fit into the consumer.

    With C the covariance of the inputs, m their mean, S what is kept and R what is removed:
    A = C_RS (C_SS + λI)^-1, W' = W_S + W_R A, b' = b + W_R (m_R - A m_S). This minimises E|Wx - W'x_S - b'|² plus a
    ridge on W' - W_S, so that it is never worse than ``bias`` (A = 0) on the calibration text. Without the intercept C
    is E[xx'] and m is 0: no bias is added.

    ``ridge: auto`` fits three quarters of the calibration windows with each of a few ridges, takes for every site the
    one that is best on the other quarter, and fits all windows with it. A site where none is better there than ``bias``
    (without intercept: than no repair) gets that instead, and says so.
    """

    name = "least_squares"

    intercept: Annotated[bool, Field(description="Add a bias; without it the checkpoint needs none.")] = True
    ridge: Annotated[
        Annotated[float, Field(ge=0)] | Literal["auto"],
        Field(
            description="Pull towards the old weight, as a part of the kept channels' mean variance; `auto` chooses it "
            "for every site on held-out calibration windows, and falls back to `bias` where that is better."
        ),
    ] = "auto"

    @property
    def adds_bias(self) -> bool:
        """Without the intercept it adds none."""
        return self.intercept

    def measures(self) -> tuple[type[Statistic], ...]:
        """List what must be measured: held-out windows only where the ridge is to be chosen."""
        return (Gram, HeldOutGram) if self.ridge == "auto" else (Gram,)

    def correct(self, site: Site, stats: SiteStatistics, weight: Tensor, keep: Sequence[int]) -> Correction:
        """Return the new columns [out_features, kept channels] and, with an intercept, what is added to the output."""
        seen = stats[Gram].spread
        kept = torch.tensor(site.channels_of(keep), device=weight.device)
        dense = weight.to(seen.squares)
        text = _Text.of(seen, intercept=self.intercept)
        if self.ridge != "auto":
            return self._corrected(dense, kept, _lost(dense, kept, text, self.ridge), text)
        held_out = stats[HeldOutGram].spread
        if not held_out.tokens:
            raise CalibrationError(
                "compensator.ridge: auto judges on held-out calibration windows, one in four, and there is none; "
                "give at least four windows, or a ridge such as 0.01"
            )
        fitted = _Text.of(seen.without(held_out), intercept=self.intercept)
        judge = _Text.of(held_out, intercept=self.intercept)
        errors = {ridge: judge.error(_lost(dense, kept, fitted, ridge), fitted.mean) for ridge in RIDGES}
        floor = judge.error(_lost(dense, kept, fitted, None), fitted.mean)
        best = min(RIDGES, key=errors.__getitem__)
        if errors[best] < floor:
            return self._corrected(dense, kept, _lost(dense, kept, text, best), text)
        note = (
            f"{'bias' if self.intercept else 'no repair'}, since least squares does no better on held-out text "
            f"(mean square error {errors[best]:.4g} against {floor:.4g})"
        )
        return replace(self._corrected(dense, kept, _lost(dense, kept, text, None), text), weight=None, note=note)

    def _corrected(self, dense: Tensor, kept: Tensor, lost: Tensor, text: _Text) -> Correction:
        return Correction(dense[:, kept] - lost[:, kept], lost @ text.mean if self.intercept else None)


class _Text(NamedTuple):
    """What is known of some text: products about the mean, or with no intercept about zero.

    Args:
        products: E[(x - mean)(x - mean)'] [channels, channels].
        mean: [channels]; zeros with no intercept.
    """

    products: Tensor
    mean: Tensor

    @classmethod
    def of(cls, spread: Spread, *, intercept: bool) -> _Text:
        covariance, mean = spread.squares[0] / spread.tokens.to(spread.squares), spread.mean.to(spread.squares)
        return cls(covariance, mean) if intercept else cls(covariance.addr_(mean, mean), torch.zeros_like(mean))

    def error(self, lost: Tensor, mean: Tensor) -> float:
        """Return E|lost (x - mean)|² on this text, where ``mean`` is another text's."""
        spread = ((lost @ self.products) * lost).sum()
        return float(spread + (lost @ (self.mean - mean)).square().sum())


def _lost(dense: Tensor, kept: Tensor, text: _Text, ridge: float | None) -> Tensor:
    """Return the map from an input to what the output loses, less its mean.

    Args:
        dense: the consumer's weight [out_features, channels].
        kept: channels that stay.
        text: what to fit.
        ridge: as a part of the kept channels' mean variance; None to leave the kept columns as they are.

    Returns:
        [out_features, channels]: the removed columns, and the kept ones' change with the sign turned.
    """
    lost = dense.clone()
    lost[:, kept] = 0
    if ridge is not None:
        target = (lost @ text.products)[:, kept]
        lost[:, kept] = -torch.cholesky_solve(target.mT, _factor(text.products[kept][:, kept], ridge)).mT
    return lost


def _factor(products: Tensor, ridge: float) -> Tensor:
    """Factorise products plus a ridge; the ridge grows where a matrix of low rank needs it."""
    scale = products.diagonal().mean() or products.new_ones(())
    ridge = max(ridge, torch.finfo(products.dtype).eps * len(products))
    factor: Tensor
    while True:
        factor, failed = torch.linalg.cholesky_ex(products + ridge * scale * torch.eye(len(products)).to(products))
        if not failed:
            return factor
        ridge *= 10
