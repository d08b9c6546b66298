"""Means and variances of the channels, merged exactly over batches and processes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from flapkit.model.site import Site
from flapkit.pruning.statistics import Statistic
from flapkit.system.errors import CalibrationError

IN_CACHE = 2**16
"""Numbers whose moments are taken at once on a CPU: half a megabyte in float64, far faster than all together."""


class Spread(NamedTuple):
    """Mean and squared deviations of inputs, over some tokens.

    Attributes:
        tokens: how many, float64 [1].
        mean: float64 [channels].
        squares: summed squares of the deviations [channels]; or summed products of the deviations of channels of one
            block [blocks, width, width], blocks being runs of ``width`` channels; or some rows of these products.
    """

    tokens: Tensor
    mean: Tensor
    squares: Tensor

    def rows(self, channels: Tensor) -> Spread:
        """Take only some channels' rows of the products [blocks, channels, width]."""
        return self._replace(squares=self.squares.index_select(1, channels))

    def merged(self, other: Spread, rows: Tensor | None = None) -> Spread:
        """Merge with the spread of other tokens: Chan, Golub and LeVeque (1979), equation 2.1.

        Args:
            other: of the same channels.
            rows: the channels whose rows both have; None for all.
        """
        tokens = self.tokens + other.tokens
        if not tokens:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.tokens / tokens)
        between = (delta * (self.tokens * other.tokens / tokens).sqrt()).to(self.squares.dtype)
        squares = self.squares + other.squares
        if squares.dim() == 1:
            return Spread(tokens, mean, squares.add_(between.square()))
        blocks = between.view(len(squares), -1)
        left = blocks if rows is None else blocks[:, rows]
        return Spread(tokens, mean, squares.baddbmm_(left[:, :, None], blocks[:, None, :]))


class SpreadStatistic(Statistic):
    """A statistic whose state is a ``Spread``, merged exactly over batches and ranks."""

    _tokens: Tensor
    _mean: Tensor
    _squares: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        # The state takes memory when the first batch comes.
        for name in ("_tokens", "_mean", "_squares"):
            self.add_state(name, torch.zeros(0, dtype=torch.float64))

    @classmethod
    def size_of(cls, site: Site) -> int:
        """Return the bytes that the statistic of a site takes."""
        return sum(part.nbytes for part in cls.of(site)._empty(torch.device("meta")))

    @abstractmethod
    def _empty(self, device: torch.device) -> Spread:
        """Return the spread of no tokens."""

    @abstractmethod
    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add inputs of the consumer.

        Args:
            x: [tokens, channels], any floating dtype.
            weights: for how many tokens each of them counts, floating [tokens], none negative; None for one each.
        """

    def merge_(self) -> None:
        """Merge the processes' spreads, also that of a process that saw nothing."""
        self._keep(self.spread)
        super().merge_()

    def combine_(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Merge the spreads of several processes."""
        spreads = (Spread(state["_tokens"], state["_mean"], state["_squares"]) for state in states)
        self._keep(reduce(Spread.merged, spreads))

    def _keep(self, spread: Spread) -> None:
        self._tokens, self._mean, self._squares = spread

    @property
    def spread(self) -> Spread:
        """What was seen."""
        if not self._tokens.numel():
            return self._empty(self.device)
        return Spread(self._tokens, self._mean, self._squares)

    def is_finite(self) -> bool:
        """Tell whether all that was taken in so far was finite."""
        return bool(torch.isfinite(self._mean).all() and torch.isfinite(self._squares).all())

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""
        return int(self.spread.tokens)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, float64 [channels]."""
        return self.spread.mean


class Moments(SpreadStatistic):
    """Token count, mean and variance of every channel, merged exactly.

    Deviations from the mean so far are summed in float64: the shifted data of Chan, Golub and LeVeque (1983). A batch
    whose own mean lies far from that one loses nothing: what nearly cancels is then a part of the variance itself.
    """

    def _empty(self, device: torch.device) -> Spread:
        zeros = torch.zeros(self.channels, dtype=torch.float64, device=device)
        return Spread(zeros.new_zeros(1), zeros, zeros)

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Merge the moments of ``x`` [tokens, channels], counted by ``weights`` [tokens]."""
        if len(x) == 0 or (weights is not None and not weights.any()):
            return
        # One sweep over rows that stay in a processor's cache.
        size = max(1, IN_CACHE // self.channels) if x.device.type == "cpu" else len(x)
        parts = x.split(size)
        counts: Sequence[Tensor | None] = [None] * len(parts) if weights is None else weights.double().split(size)
        seen = self.spread
        about = seen.mean if seen.tokens else parts[0].double().mean(dim=0)
        first, second = torch.zeros_like(about), torch.zeros_like(about)
        for part, count in zip(parts, counts, strict=True):
            deviations = part.to(torch.float64, copy=True).sub_(about)
            first += deviations.sum(dim=0) if count is None else count @ deviations
            deviations.square_()
            second += deviations.sum(dim=0) if count is None else count @ deviations
        tokens = seen.tokens + (len(x) if weights is None else weights.sum(dtype=torch.float64))
        squares = seen.squares + (second - first.square() / tokens).clamp_(min=0)
        self._keep(Spread(tokens, about + first / tokens, squares))

    @property
    def variance(self) -> Tensor:
        """Sample variance of each channel (divided by tokens - 1), float64 [channels].

        Raises:
            CalibrationError: fewer than two tokens were seen.
        """
        spread = self.spread
        return spread.squares / (check_tokens(spread, "a variance") - 1)

    @property
    def second_moment(self) -> Tensor:
        """Mean square E[x²] of each channel, float64 [channels]."""
        spread = self.spread
        return spread.squares / spread.tokens + spread.mean.square()


def check_tokens(spread: Spread, what: str) -> Tensor:
    """Return the number of tokens of a spread [1].

    Raises:
        CalibrationError: there are fewer than two.
    """
    if spread.tokens < 2:
        raise CalibrationError(
            f"calibration: {what} needs two tokens, and {int(spread.tokens)} was seen; give more text"
        )
    return spread.tokens
