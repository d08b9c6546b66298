"""What calibration measures about a consumer's input."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self

from flapkit.model.site import Site
from flapkit.system.errors import CalibrationError

S = TypeVar("S", bound="Statistic")

IN_CACHE = 2**16
"""Numbers whose moments are taken at once on a CPU: half a megabyte in float64, far faster than all together."""


class Statistic(Metric):
    """What calibration measures about the input of one consumer.

    A torchmetrics ``Metric``, so that Lightning merges it over ranks. Subclasses keep their state in float64 and
    merge exactly: the result depends neither on the order nor on the size of the batches.
    """

    full_state_update = False

    version: ClassVar[int] = 1
    """Raise it when what the statistic measures changes: cached values of another version are not used."""

    windows: ClassVar[Literal["all", "held_out"]] = "all"
    """Which calibration windows are taken in: all, or those alone that are held out to judge what the rest fitted."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        # Merged once, when all is measured, and not each time that somebody asks.
        super().__init__(**{"sync_on_compute": False, **kwargs})
        self.channels = channels

    def merge_(self) -> None:
        """Take in what the other processes of the run measured, in all of them at once."""
        self.sync()
        # What is merged is all that counts from now on: torchmetrics would go back to this process's part.
        self._is_synced, self._cache = False, None

    @classmethod
    def of(cls, site: Site) -> Self:
        """Build the empty statistic of a site."""
        return cls(site.channels)

    @classmethod
    def size_of(cls, site: Site) -> int:
        """Return the bytes that the statistic of a site takes; to be overridden where its state grows."""
        return sum(state.nbytes for state in cls.of(site).metric_state.values() if isinstance(state, Tensor))

    def saved(self) -> dict[str, Tensor]:
        """Return all that was measured, as tensors by name.

        Raises:
            TypeError: the state holds lists, which no file of tensors can.
        """
        state = self.metric_state
        if lists := [name for name, value in state.items() if not isinstance(value, Tensor)]:
            raise TypeError(f"{type(self).__name__} keeps lists ({lists[0]}): it cannot be saved")
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    @classmethod
    def restored(cls, site: Site, saved: Mapping[str, Tensor]) -> Self:
        """Build the statistic of a site from what ``saved`` returned.

        Raises:
            KeyError: a part of the state is missing.
        """
        restored: Any = cls.of(site)
        for name in restored.metric_state:
            setattr(restored, name, saved[name])
        # torchmetrics warns of a metric that is asked for its value and was never updated.
        restored._update_count = 1
        return restored  # type: ignore[no-any-return]

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in inputs of the consumer, which are the model's own, not to be changed.

        Args:
            x: [tokens, channels], any floating dtype, padding already left out.
        """

    def is_finite(self) -> bool:
        """Tell whether all that was taken in so far was finite: by default, whether the state is."""
        states = (
            part for state in self.metric_state.values() for part in (state if isinstance(state, list) else [state])
        )
        return all(bool(torch.isfinite(part).all()) for part in states)


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


class Spread(NamedTuple):
    """How inputs lie about their mean, over some tokens.

    Args:
        tokens: how many, float64 [1].
        mean: float64 [channels].
        squares: summed squares of the deviations [channels]; or summed products of the deviations of channels of one
            block [blocks, width, width], blocks being runs of ``width`` channels.
    """

    tokens: Tensor
    mean: Tensor
    squares: Tensor

    def products(self, deviation: Tensor) -> Tensor:
        """Return the squares of a deviation from the mean [channels], or its products, of ``squares``' shape."""
        if self.squares.dim() == 1:
            return deviation.square()
        blocks = deviation.to(self.squares.dtype).view(len(self.squares), -1)
        return blocks[:, :, None] * blocks[:, None, :]

    def merged(self, other: Spread) -> Spread:
        """Take in other tokens: Chan, Golub and LeVeque (1979), equation 2.1."""
        tokens = self.tokens + other.tokens
        if not tokens:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.tokens / tokens)
        between = self.products(delta).mul_((self.tokens * other.tokens / tokens).to(self.squares.dtype))
        return Spread(tokens, mean, between.add_(self.squares).add_(other.squares))

    def without(self, part: Spread) -> Spread:
        """Take out some of the tokens: the inverse of ``merged``.

        What is left must not be much less than what is taken out, or it drowns in rounding.
        """
        tokens = self.tokens - part.tokens
        mean = self.mean + (self.mean - part.mean) * (part.tokens / tokens)
        between = self.products(part.mean - mean).mul_((-part.tokens * tokens / self.tokens).to(self.squares.dtype))
        return Spread(tokens, mean, between.add_(self.squares).sub_(part.squares))


class _SpreadStatistic(Statistic):
    """A statistic whose state is a ``Spread``, merged exactly over batches and ranks."""

    _tokens: Tensor
    _mean: Tensor
    _squares: Tensor

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        # No reduction: ranks arrive stacked, and are merged when a figure is asked for. The state takes memory when
        # the first batch comes, since a torchmetrics default would be a second copy of it.
        for name in ("_tokens", "_mean", "_squares"):
            self.add_state(name, torch.zeros(0, dtype=torch.float64), dist_reduce_fx=None, persistent=True)

    @classmethod
    def size_of(cls, site: Site) -> int:
        """Return the bytes that the statistic of a site takes."""
        return sum(part.nbytes for part in cls.of(site)._empty(torch.device("meta")))

    @abstractmethod
    def _empty(self, device: torch.device) -> Spread:
        """Return the spread of no tokens."""

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the ranks' states, also of a rank that saw nothing."""
        self._keep(self.spread)
        super().sync(*args, **kwargs)

    def _keep(self, spread: Spread) -> None:
        self._tokens, self._mean, self._squares = spread

    @property
    def spread(self) -> Spread:
        """What was seen, by all ranks where they were gathered."""
        if not self._tokens.numel():
            return self._empty(self.device)
        if self._mean.dim() == 1:
            return Spread(self._tokens, self._mean, self._squares)
        ranks = zip(self._tokens, self._mean, self._squares, strict=True)
        return reduce(Spread.merged, itertools.starmap(Spread, ranks))

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


class Moments(_SpreadStatistic):
    """Token count, mean and variance of every channel, merged exactly.

    Deviations from the mean so far are summed in float64: the shifted data of Chan, Golub and LeVeque (1983). A batch
    whose own mean lies far from that one loses nothing: what nearly cancels is then a part of the variance itself.
    """

    def _empty(self, device: torch.device) -> Spread:
        zeros = torch.zeros(self.channels, dtype=torch.float64, device=device)
        return Spread(zeros.new_zeros(1), zeros, zeros)

    def update(self, x: Tensor) -> None:
        """Merge the moments of ``x`` [tokens, channels]."""
        if len(x) == 0:
            return
        # One sweep over rows that stay in a processor's cache.
        parts = x.split(max(1, IN_CACHE // self.channels) if x.device.type == "cpu" else len(x))
        seen = self.spread
        about = seen.mean if seen.tokens else parts[0].double().mean(dim=0)
        first, second = torch.zeros_like(about), torch.zeros_like(about)
        for part in parts:
            deviations = part.to(torch.float64, copy=True).sub_(about)
            first += deviations.sum(dim=0)
            second += deviations.square_().sum(dim=0)
        tokens = seen.tokens + len(x)
        squares = seen.squares + (second - first.square() / tokens).clamp_(min=0)
        self._keep(Spread(tokens, about + first / tokens, squares))

    def compute(self) -> Tensor:
        """Return the variance [channels]."""
        return self.variance

    @property
    def variance(self) -> Tensor:
        """Sample variance of each channel (divided by tokens - 1), float64 [channels].

        Raises:
            CalibrationError: fewer than two tokens were seen.
        """
        spread = self.spread
        return spread.squares / (_enough(spread, "a variance") - 1)

    @property
    def second_moment(self) -> Tensor:
        """Mean square E[x²] of each channel, float64 [channels]."""
        spread = self.spread
        return spread.squares / spread.tokens + spread.mean.square()


class Gram(_SpreadStatistic):
    """Token count, mean and covariance of all channels of a consumer, merged exactly.

    The covariance of up to 4096 channels is kept in float64. That of more is kept in float32, in half the memory:
    each batch's products of deviations from its own mean are small enough to be exact to 1e-6.

    Args:
        channels: channels of the consumer.
        blocks: runs of channels, all as long; only products within a run are kept.
    """

    widest_in_float64: ClassVar[int] = 4096

    def __init__(self, channels: int, blocks: int = 1, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        self.blocks = blocks

    def _empty(self, device: torch.device) -> Spread:
        width = self.channels // self.blocks
        dtype = torch.float64 if width <= self.widest_in_float64 else torch.float32
        zeros = torch.zeros(self.channels, dtype=torch.float64, device=device)
        squares = torch.zeros((self.blocks, width, width), dtype=dtype, device=device)
        return Spread(zeros.new_zeros(1), zeros, squares)

    def update(self, x: Tensor) -> None:
        """Merge the products of ``x`` [tokens, channels]."""
        if not self._tokens.numel():
            self._keep(self._empty(self.device))
        if len(x) == 0:
            return
        x = x.double()
        mean = x.mean(dim=0)
        batch, seen, delta = mean.new_full((1,), len(x)), self._tokens, mean - self._mean
        # Spread.merged, but in place, since the matrix may be large; delta becomes one more deviation.
        between = delta * (seen * batch / (seen + batch)).sqrt()
        deviations = torch.cat([x - mean, between[None]]).to(self._squares.dtype)
        rows = deviations.view(len(deviations), self.blocks, -1).transpose(0, 1)
        self._squares.baddbmm_(rows.mT, rows)
        self._mean = self._mean + delta * (batch / (seen + batch))
        self._tokens = seen + batch

    def compute(self) -> Tensor:
        """Return the covariance [blocks, width, width]."""
        return self.covariance

    @property
    def covariance(self) -> Tensor:
        """Covariance of the channels of each block (divided by tokens) [blocks, width, width].

        Raises:
            CalibrationError: fewer than two tokens were seen.
        """
        spread = self.spread
        return spread.squares / _enough(spread, "a covariance").to(spread.squares)


class HeldOutGram(Gram):
    """The same over the held-out calibration windows alone, to judge what the others fitted."""

    windows = "held_out"


class TargetGram(Gram):
    """The same of a consumer's inputs and, after them, of what its output should be: for sequential calibration.

    Channels are ``site.channels`` inputs in the model whose earlier sites are pruned, then ``site.out_features``
    targets: the output, less the consumer's own bias, with which the hidden state would be the dense model's again.
    """

    @classmethod
    def of(cls, site: Site) -> Self:
        """Build the empty statistic of a site."""
        return cls(site.channels + site.out_features)


class HeldOutTargetGram(TargetGram):
    """The same over the held-out calibration windows alone."""

    windows = "held_out"


class UnitGram(Gram):
    """The same for the channels of each unit alone: small, and all that a score of single units needs."""

    @classmethod
    def of(cls, site: Site) -> Self:
        """Build the empty statistic of a site: one block for each unit."""
        return cls(site.channels, site.units)


def _enough(spread: Spread, what: str) -> Tensor:
    if spread.tokens < 2:
        raise CalibrationError(
            f"calibration: {what} needs two tokens, and {int(spread.tokens)} was seen; give more text"
        )
    return spread.tokens


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

    def only(self, classes: Iterable[type[Statistic]]) -> SiteStatistics:
        """Return the statistics of some classes alone: what a component declares is what it sees."""
        declared = set(classes)
        return SiteStatistics(statistic for kind, statistic in self._by_class.items() if kind in declared)

    def __len__(self) -> int:
        return len(self._by_class)


def size_of(statistics: Sequence[type[Statistic]], sites: Sequence[Site]) -> int:
    """Return the bytes that statistics of some sites take together."""
    return sum(statistic.size_of(site) for statistic in statistics for site in sites)


def split_by_memory(sites: Sequence[Site], statistics: Sequence[type[Statistic]], memory: float) -> list[list[Site]]:
    """Split sites, in their order, into runs whose statistics fit in memory together; at least one site in each.

    Args:
        sites: the sites.
        statistics: what is measured there, as classes.
        memory: bytes.
    """
    parts: list[list[Site]] = []
    left = 0.0
    for site in sites:
        size = size_of(statistics, [site])
        if not parts or size > left:
            parts.append([])
            left = memory
        parts[-1].append(site)
        left -= size
    return parts
