"""What calibration measures about a consumer's input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self

from flapkit.errors import CalibrationError
from flapkit.sites import Site

S = TypeVar("S", bound="Statistic")


class Statistic(Metric):
    """What calibration measures about the input of one consumer.

    A torchmetrics ``Metric``, so that Lightning merges it over ranks. Subclasses keep their state in float64 and
    merge exactly: the result depends neither on the order nor on the size of the batches.
    """

    full_state_update = False

    windows: ClassVar[Literal["all", "held_out"]] = "all"
    """Which calibration windows are taken in: all, or those alone that are held out to judge what the rest fitted."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels = channels

    @classmethod
    def of(cls, site: Site) -> Self:
        """Build the empty statistic of a site."""
        return cls(site.channels)

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in inputs of the consumer.

        Args:
            x: [tokens, channels], any floating dtype, padding already left out.
        """

    @abstractmethod
    def is_finite(self) -> bool:
        """Tell whether all that was taken in so far was finite."""


class GradientStatistic(Statistic):
    """A statistic that also sees the gradient of the loss: calibration then runs a backward pass for each batch.

    The loss is the cross-entropy of the next token, in nats, summed over the calibration text.
    """

    @abstractmethod
    def update(self, x: Tensor, gradient: Tensor) -> None:  # type: ignore[override]
        """Take in inputs of the consumer, and the loss's gradient at its output.

        Args:
            x: [tokens, channels], any floating dtype, padding already left out.
            gradient: [tokens, out_features], of the same tokens.
        """


class Moments(Statistic):
    """Token count, mean and variance of every channel, merged exactly.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), in float64.
    """

    _tokens: Tensor
    _mean: Tensor
    _squares: Tensor

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        # No reduction: ranks arrive stacked, and are merged when a figure is asked for.
        for name, shape in (("_tokens", (1,)), ("_mean", (channels,)), ("_squares", (channels,))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx=None, persistent=True)

    def update(self, x: Tensor) -> None:
        """Merge the moments of ``x`` [tokens, channels]."""
        if len(x) == 0:
            return
        x = x.double()
        mean = x.mean(dim=0)
        squares = (x - mean).square_().sum(dim=0)
        self._tokens, self._mean, self._squares = _merge(
            (self._tokens, self._mean, self._squares), (torch.full_like(self._tokens, len(x)), mean, squares)
        )

    def compute(self) -> Tensor:
        """Return the variance [channels]."""
        return self.variance

    def is_finite(self) -> bool:
        """Tell whether all that was taken in so far was finite."""
        return bool(torch.isfinite(self._squares).all())

    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._mean.dim() == 1:
            return self._tokens, self._mean, self._squares
        ranks = list(zip(self._tokens, self._mean, self._squares, strict=True))
        total = ranks[0]
        for rank in ranks[1:]:
            total = _merge(total, rank)
        return total

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""
        return int(self._merged()[0])

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, float64 [channels]."""
        return self._merged()[1]

    @property
    def variance(self) -> Tensor:
        """Sample variance of each channel (divided by tokens - 1), float64 [channels].

        Raises:
            CalibrationError: fewer than two tokens were seen.
        """
        tokens, _, squares = self._merged()
        if tokens < 2:
            raise CalibrationError(
                f"calibration: a variance needs two tokens, and {int(tokens)} was seen; give more text"
            )
        return squares / (tokens - 1)

    @property
    def second_moment(self) -> Tensor:
        """Mean square E[x²] of each channel, float64 [channels]."""
        tokens, mean, squares = self._merged()
        return squares / tokens + mean.square()


def _merge(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Merge two (tokens, mean, sum of squared deviations) triples; Chan et al. (1979), equation 2.1."""
    tokens = a[0] + b[0]
    if not tokens:
        return a
    delta = b[1] - a[1]
    mean = a[1] + delta * (b[0] / tokens)
    squares = a[2] + b[2] + delta.square() * (a[0] * b[0] / tokens)
    return tokens, mean, squares


class SiteStatistics(Mapping[type[Statistic], Statistic]):
    """The statistics of one site, keyed by their class: ``stats[Moments].mean``."""

    def __init__(self, statistics: Iterable[Statistic]) -> None:
        self._by_class = {type(statistic): statistic for statistic in statistics}

    def __getitem__(self, key: type[S]) -> S:
        """Return the statistic of a class, typed as that class."""
        if key not in self._by_class:
            measured = ", ".join(k.__name__ for k in self._by_class) or "none"
            raise KeyError(f"{key.__name__} was not measured (measured: {measured}); declare it in `statistics`")
        return self._by_class[key]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[type[Statistic]]:
        return iter(self._by_class)

    def __len__(self) -> int:
        return len(self._by_class)
