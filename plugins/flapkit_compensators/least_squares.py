"""Least squares: fit the removed channels' output by the kept channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from flapkit.interfaces import (
    CalibrationError,
    Compensator,
    Correction,
    FittedGram,
    FittedTargetGram,
    Gram,
    HeldOutGram,
    HeldOutTargetGram,
    Site,
    SiteStatistics,
    Spread,
    TargetGram,
)

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The candidates of ``ridge: auto``, as fractions of the kept channels' mean variance."""

PROJECTIONS = 64
"""Random combinations of the outputs by which ridges are compared, at less cost than by all of them."""


@dataclass(frozen=True)
class LeastSquares(Compensator):
    """Fit the removed channels' output by the kept channels, and fold the fit into the consumer.

    With C the covariance of the inputs, m their mean, S the kept and R the removed channels:
    A = C_RS (C_SS + λI)^-1, W' = W_S + W_R A, b' = b + W_R (m_R - A m_S). This minimises E|Wx - W'x_S - b'|² plus a
    ridge on W' - W_S, so that it is never worse than ``bias`` (A = 0) on the calibration text. Without the intercept C
    is E[xx'] and m is 0: no bias is added.

    ``ridge: auto`` fits three quarters of the calibration windows with several ridges, chooses for every site the best
    one on the remaining quarter (downhill from 0.01), and fits all windows with it. If none is better than ``bias``
    (without the intercept: than no repair) on these windows, the site gets that instead, with a note. A site without
    kept channels gets the bias alone.
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

    def measures(self) -> tuple[type[Gram], ...]:
        """Return the statistics to measure: of held-out windows only for ``ridge: auto``."""
        return (FittedGram, HeldOutGram) if self.ridge == "auto" else (Gram,)

    def measures_in_sequence(self) -> tuple[type[Gram], ...]:
        """List what must be measured where the earlier sites are pruned already: the same, with targets."""
        return (FittedTargetGram, HeldOutTargetGram) if self.ridge == "auto" else (TargetGram,)

    def correct(self, site: Site, stats: SiteStatistics, weight: Tensor, keep: Sequence[int]) -> Correction:
        """Return the new columns [out_features, kept channels] and, with the intercept, the bias."""
        kept = torch.tensor(site.channels_of(keep), dtype=torch.long, device=weight.device)
        fitted, *others = (spread.rows(kept) for spread in self._spreads(stats))

        def whole() -> _Problem:
            merged = fitted.merged(others[0], rows=kept) if others else fitted
            return _Problem.of(merged, kept, weight, intercept=self.intercept)

        if not keep:
            return Correction(bias=whole().target if self.intercept else None)
        if self.ridge != "auto":
            return self._correction(whole(), weight[:, kept], self.ridge)
        (held_out,) = others
        if not held_out.tokens:
            raise CalibrationError(
                "compensator.ridge: auto needs held-out calibration windows, one in four, and there are none; "
                "use at least four windows, or a ridge such as 0.01"
            )
        outputs = _combinations(site.out_features, weight.device)
        combined = outputs.T @ weight.to(outputs.dtype)
        problems = (
            _Problem.of(spread, kept, combined, intercept=self.intercept, outputs=outputs)
            for spread in (fitted, held_out)
        )
        ridge, gain = _choose_ridge(*problems)
        if gain < 0:
            return self._correction(whole(), weight[:, kept], ridge)
        instead = "bias" if self.intercept else "no repair"
        note = f"{instead}, since the squared error of least squares on held-out text is not smaller (+{gain:.2g})"
        return Correction(bias=whole().target if self.intercept else None, note=note)

    def _spreads(self, stats: SiteStatistics) -> list[Spread]:
        """Return what was seen on the text to fit and, with ``ridge: auto``, on the held-out windows."""
        in_sequence = TargetGram in stats or FittedTargetGram in stats
        return [stats[kind].spread for kind in (self.measures_in_sequence() if in_sequence else self.measures())]

    def _correction(self, problem: _Problem, columns: Tensor, ridge: float) -> Correction:
        change = problem.fit(ridge)
        return Correction(columns + change.T, problem.target - change.T @ problem.mean if self.intercept else None)


class _Problem(NamedTuple):
    """What the kept channels x and the gap e are on some text: e is what the output lacks when the others are removed.

    With no intercept, the products are taken about zero and the means are zeros.

    Args:
        products: E[(x - mean)(x - mean)'] [kept channels, kept channels].
        cross: E[(x - mean)(e - target)'] [kept channels, out_features].
        mean: of x [kept channels].
        target: mean of e [out_features].
    """

    products: Tensor
    cross: Tensor
    mean: Tensor
    target: Tensor

    @classmethod
    def of(
        cls, spread: Spread, kept: Tensor, dense: Tensor, *, intercept: bool, outputs: Tensor | None = None
    ) -> _Problem:
        """Take what was measured; where no targets were, they are the dense consumer's outputs.

        Args:
            spread: of the inputs, and perhaps of the targets after them; only the rows of the kept channels.
            kept: the kept channels.
            dense: the dense consumer's weight [out_features, channels], or combinations of its rows.
            intercept: whether a bias will take care of the means.
            outputs: those combinations of the outputs [out_features, combinations], float32.
        """
        dtype = spread.squares.dtype if outputs is None else outputs.dtype
        mean, scale = spread.mean.to(dtype), (1 / spread.tokens).to(dtype)
        dense, channels = dense.to(dtype), dense.shape[1]
        aimed = len(mean) > channels
        if aimed:
            others = torch.arange(channels, len(mean), device=dense.device)
        else:
            removed = torch.ones(channels, dtype=torch.bool, device=dense.device).index_fill_(0, kept, False)
            others = removed.nonzero().squeeze(1)
        columns = torch.cat([kept, others])
        squares = spread.squares[0].to(dtype).index_select(1, columns).mul_(scale)
        if not intercept:
            squares.addr_(mean[kept], mean[columns])
        products, beside = squares.split([len(kept), len(others)], dim=1)
        if aimed:
            left, wanted, centre = dense.index_select(1, kept), beside, mean[others]
            if outputs is not None:
                wanted, centre = beside @ outputs, outputs.T @ centre
            cross, target = wanted - products @ left.T, centre - left @ mean[kept]
        else:
            lost = dense.index_select(1, others)
            cross, target = beside @ lost.T, lost @ mean[others]
        if not intercept:
            return cls(products, cross, torch.zeros_like(mean[kept]), torch.zeros_like(target))
        return cls(products, cross, mean[kept], target)

    def fit(self, ridge: float) -> Tensor:
        """Return the change [kept channels, out_features] of the kept columns that makes good most of the gap."""
        change: Tensor = torch.cholesky_solve(self.cross, _factor(self.products, ridge))
        return change

    def gain(self, fitted: _Problem, change: Tensor) -> float:
        """Return by how much a change that was fitted on another text, with its offset, alters the error on this text.

        Returns:
            E|e - change' x - offset|² less E|e - target|², both with the other text's means.
        """
        explained = self.products @ change - 2 * self.cross
        shift = self.target - fitted.target
        moved = shift - change.T @ (self.mean - fitted.mean)
        return float((explained * change).sum() + moved.square().sum() - shift.square().sum())


def _choose_ridge(fitted: _Problem, held_out: _Problem) -> tuple[float, float]:
    """Go downhill from the middle ridge on the held-out text: up, where the best one is more often, or else down.

    Returns:
        The ridge, and by how much it alters the error of no repair on the held-out text; below 0 it is better.
    """

    @cache
    def gain(index: int) -> float:
        outside = not 0 <= index < len(RIDGES)
        return float("inf") if outside else held_out.gain(fitted, fitted.fit(RIDGES[index]))

    best = middle = len(RIDGES) // 2
    for step in (1, -1):
        while gain(best + step) < gain(best):
            best += step
        if best != middle:
            break
    return RIDGES[best], gain(best)


def _combinations(outputs: int, device: torch.device) -> Tensor:
    """Draw the combinations of outputs [outputs, combinations]: random signs; each output alone where there are few."""
    if outputs <= PROJECTIONS:
        return torch.eye(outputs, device=device)
    signs = torch.randint(2, (outputs, PROJECTIONS), generator=torch.Generator().manual_seed(0))
    drawn: Tensor = (2.0 * signs - 1) / PROJECTIONS**0.5
    return drawn.to(device)


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
