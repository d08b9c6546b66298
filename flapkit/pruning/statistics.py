"""What calibration measures about a consumer's input."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import ClassVar, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from flapkit.model.site import Site
from flapkit.system.errors import CalibrationError
from flapkit.system.processes import gather_tensors

S = TypeVar("S", bound="Statistic")

IN_CACHE = 2**16
"""Numbers whose moments are taken at once on a CPU: half a megabyte in float64, far faster than all together."""

STRIPS = 8
"""Strips in which a symmetric product is computed: 9/16 of the multiplications of a whole one."""


class Statistic(ABC):
    """What calibration measures about the input of one consumer.

    The state is tensors of any shape and dtype, each declared with ``add_state``; a count is a tensor too. Nothing else
    is merged over processes, moved between devices, or cached. Sums are kept in float64, so that the result depends
    neither on the order nor on the size of the batches. A whole statistic of your own:

    ```python
    class Largest(Statistic):
        def __init__(self, channels):
            super().__init__(channels)
            self.add_state("values", torch.zeros(channels))

        def update(self, x):
            self.values = torch.maximum(self.values, x.abs().amax(dim=0).float())

        def combine_(self, states):
            self.values = torch.stack([state["values"] for state in states]).amax(dim=0)
    ```

    Args:
        channels: input channels of the consumer.
    """

    version: ClassVar[int] = 1
    """Raise it when what the statistic measures changes: cached values of another version are not used."""

    windows: ClassVar[Literal["all", "fitted", "held_out"]] = "all"
    """Which calibration windows are taken in: ``all``; those ``held_out`` to judge a fit; or the others, to which it is
    ``fitted``."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self._names: list[str] = []

    def add_state(self, name: str, value: Tensor) -> None:
        """Declare a part of the state, which becomes the attribute ``name``.

        Args:
            name: of the attribute.
            value: its value before any text was seen.
        """
        self._names.append(name)
        setattr(self, name, value)

    @property
    def state(self) -> dict[str, Tensor]:
        """All that was measured, by name."""
        return {name: getattr(self, name) for name in self._names}

    @property
    def device(self) -> torch.device:
        """Where the state is."""
        return next((value.device for value in self.state.values()), torch.device("cpu"))

    def to(self, device: torch.device) -> Self:
        """Move the state to a device, and return the statistic."""
        for name, value in self.state.items():
            setattr(self, name, value.to(device))
        return self

    def merge_(self) -> None:
        """Merge the states of all processes of the run; every process must call it."""
        gathered = {name: gather_tensors(value) for name, value in self.state.items()}
        count = len(next(iter(gathered.values()), []))
        if count > 1:
            self.combine_([{name: values[rank] for name, values in gathered.items()} for rank in range(count)])

    def combine_(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Replace the state by that of several processes together: by default, the sum of each part of the state.

        Args:
            states: the state of each process, this one's included, in the order of their ranks.
        """
        for name in self._names:
            setattr(self, name, reduce(torch.add, [state[name] for state in states]))

    @classmethod
    def of(cls, site: Site) -> Self:
        """Build the empty statistic of a site."""
        return cls(site.channels)

    @classmethod
    def size_of(cls, site: Site) -> int:
        """Return the bytes that the statistic of a site takes; to be overridden where its state grows."""
        return sum(value.nbytes for value in cls.of(site).state.values())

    @classmethod
    def restored(cls, site: Site, state: Mapping[str, Tensor]) -> Self:
        """Build the statistic of a site from its state.

        Raises:
            KeyError: a part of the state is missing.
        """
        restored = cls.of(site)
        for name in restored.state:
            setattr(restored, name, state[name])
        return restored

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Add inputs of the consumer. They are the model's own tensors; do not change them.

        Args:
            x: [tokens, channels], any floating dtype, padding already left out.
        """

    def is_finite(self) -> bool:
        """Tell whether all inputs so far were finite: by default, whether the state is."""
        return all(bool(torch.isfinite(value).all()) for value in self.state.values())


class GradientStatistic(Statistic):
    """A statistic that also sees the gradient of the loss: calibration then runs a backward pass for each batch.

    The loss is the cross-entropy of the next token, in nats, summed over the calibration text.
    """

    @abstractmethod
    def update(self, x: Tensor, gradient: Tensor) -> None:  # type: ignore[override]
        """Add inputs of the consumer, and the loss's gradient at its output.

        Args:
            x: [tokens, channels], any floating dtype, padding already left out.
            gradient: [tokens, out_features], of the same tokens.
        """


class LayerStatistic(Statistic):
    """A statistic that sees the hidden states before and after the site's decoder layer, not the consumer's input."""

    @abstractmethod
    def update(self, before: Tensor, after: Tensor, output: Tensor | None) -> None:  # type: ignore[override]
        """Add the hidden states of tokens before and after a layer.

        Args:
            before: the layer's input [tokens, hidden], padding already left out.
            after: its output, of the same shape.
            output: the consumer's output [tokens, out_features]; None for an expert, which sees other tokens.
        """


class Angles(LayerStatistic):
    """The angles by which a layer, and the site's block alone, turn the hidden states.

    The block's angle is between the hidden states before and after its consumer's output is added: at the beginning of
    the layer for an attention, at its end for an MLP. This holds for layers that add the output unchanged.
    """

    _sums: Tensor

    def __init__(self, channels: int, *, first: bool = True) -> None:
        super().__init__(channels)
        self._first = first
        self.add_state("_sums", torch.zeros(3, dtype=torch.float64))

    @classmethod
    def of(cls, site: Site) -> Self:
        """Build the empty statistic of a site."""
        return cls(site.channels, first=site.kind == "attention")

    def update(self, before: Tensor, after: Tensor, output: Tensor | None) -> None:  # type: ignore[override]
        """Add up the angles of some tokens."""
        before, after = before.float(), after.float()
        layer = block = _angles(before, after)
        if output is not None and self._first:
            block = _angles(before, before + output.float())
        elif output is not None:
            block = _angles(after - output.float(), after)
        self._sums += torch.stack([layer.new_tensor(len(layer)), layer.sum(), block.sum()]).to(self._sums)

    @property
    def layer(self) -> float:
        """Mean angle of the layer in units of pi, from 0 to 1."""
        return float(self._sums[1] / self._sums[0])

    @property
    def block(self) -> float:
        """Mean angle of the block in units of pi; for an expert, that of the layer."""
        return float(self._sums[2] / self._sums[0])


def _angles(one: Tensor, other: Tensor) -> Tensor:
    """Return the angles between rows, in units of pi [tokens]; exact also where they are small."""
    halves = (functional.normalize(one, dim=1) - functional.normalize(other, dim=1)).norm(dim=1) / 2
    angles: Tensor = 2 / math.pi * halves.clamp(max=1).asin()
    return angles


class Spread(NamedTuple):
    """Mean and squared deviations of inputs, over some tokens.

    Attributes:
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
        """Merge with the spread of other tokens: Chan, Golub and LeVeque (1979), equation 2.1."""
        tokens = self.tokens + other.tokens
        if not tokens:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.tokens / tokens)
        between = self.products(delta).mul_((self.tokens * other.tokens / tokens).to(self.squares.dtype))
        return Spread(tokens, mean, between.add_(self.squares).add_(other.squares))


class _SpreadStatistic(Statistic):
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


class Moments(_SpreadStatistic):
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
        return spread.squares / (_enough(spread, "a variance") - 1)

    @property
    def second_moment(self) -> Tensor:
        """Mean square E[x²] of each channel, float64 [channels]."""
        spread = self.spread
        return spread.squares / spread.tokens + spread.mean.square()


class Gram(_SpreadStatistic):
    """Token count, mean and covariance of all channels of a consumer, merged exactly.

    Products of a batch's deviations from its own mean are computed in float32, or in the inputs' type if that is wider,
    and summed in float64: exact to 1e-6. Sums of more than 4096 channels are kept in float32, in half the memory.

    Args:
        channels: channels of the consumer.
        blocks: runs of channels, all as long; only products within a run are kept.
    """

    widest_in_float64: ClassVar[int] = 4096

    def __init__(self, channels: int, blocks: int = 1) -> None:
        super().__init__(channels)
        self.blocks = blocks

    def _empty(self, device: torch.device) -> Spread:
        width = self.channels // self.blocks
        dtype = torch.float64 if width <= self.widest_in_float64 else torch.float32
        zeros = torch.zeros(self.channels, dtype=torch.float64, device=device)
        squares = torch.zeros((self.blocks, width, width), dtype=dtype, device=device)
        return Spread(zeros.new_zeros(1), zeros, squares)

    def update(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Merge the products of ``x`` [tokens, channels], counted by ``weights`` [tokens]."""
        if not self._tokens.numel():
            self._keep(self._empty(self.device))
        if len(x) == 0 or (weights is not None and not weights.any()):
            return
        mean = x.mean(dim=0, dtype=torch.float64)
        rows = x.new_empty((len(x) + 1, self.channels), dtype=torch.promote_types(x.dtype, torch.float32))
        torch.sub(x, mean.to(rows.dtype), out=rows[:-1])
        if weights is None:
            batch = mean.new_full((1,), len(x))
        else:
            batch = weights.sum(dtype=torch.float64)[None]
            shift = (weights / batch).to(rows.dtype) @ rows[:-1]
            mean = mean + shift
            rows[:-1].sub_(shift).mul_(weights.to(rows.dtype).sqrt()[:, None])
        seen, delta = self._tokens, mean - self._mean
        # Spread.merged, but in place, since the matrix may be large; delta becomes one more deviation.
        rows[-1] = delta * (seen * batch / (seen + batch)).sqrt()
        # Mixed precision would round the products.
        with torch.autocast(x.device.type, enabled=False):
            _add_products_(self._squares, rows.view(len(rows), self.blocks, -1).transpose(0, 1))
        self._mean = self._mean + delta * (batch / (seen + batch))
        self._tokens = seen + batch

    @property
    def covariance(self) -> Tensor:
        """Covariance of the channels of each block (divided by tokens) [blocks, width, width].

        Raises:
            CalibrationError: fewer than two tokens were seen.
        """
        spread = self.spread
        return spread.squares / _enough(spread, "a covariance").to(spread.squares)


class HeldOutGram(Gram):
    """A ``Gram`` over the held-out calibration windows only, to evaluate what was fitted on the others."""

    windows = "held_out"


class FittedGram(Gram):
    """A ``Gram`` over the windows that are not held out."""

    windows = "fitted"


class Contributions(Statistic):
    """How often, and how much, the experts of a mixture contribute; measured at mixtures alone, empty elsewhere.

    A contribution is the router's weight times the norm of the expert's output, or 0 for tokens that are not routed to
    the expert: the input that a mixture's consumer is taken to have.
    """

    total: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        zeros = torch.zeros(channels, dtype=torch.float64)
        self.add_state("total", zeros.new_zeros(1))
        self.add_state("counts", zeros)
        self.add_state("sums", zeros.clone())

    @classmethod
    def of(cls, site: Site) -> Self:
        """Build the empty statistic of a site."""
        return cls(site.channels if site.kind == "mixture" else 0)

    def update(self, x: Tensor) -> None:
        """Add contributions [tokens, experts]."""
        if self.channels:
            self.total = self.total + len(x)
            self.counts = self.counts + (x != 0).sum(dim=0)
            self.sums = self.sums + x.sum(dim=0, dtype=torch.float64)

    @property
    def frequency(self) -> Tensor:
        """Fraction of the tokens to which each expert contributes, float64 [experts]."""
        return self.counts / self.total.clamp(min=1)

    @property
    def mean(self) -> Tensor:
        """Mean of each expert's contributions over the tokens that have one, float64 [experts]; 0 without any."""
        return self.sums / self.counts.clamp(min=1)


class TargetGram(Gram):
    """A ``Gram`` of a consumer's inputs followed by its target outputs, for sequential repair.

    Channels are ``site.channels`` inputs in the model whose earlier sites are pruned, then ``site.out_features``
    targets: the output, less the consumer's own bias, with which the hidden state would be the dense model's again.
    """

    @classmethod
    def of(cls, site: Site) -> Self:
        """Build the empty statistic of a site; a mixture is fitted to nothing."""
        return cls(0 if site.kind == "mixture" else site.channels + site.out_features)


class HeldOutTargetGram(TargetGram):
    """A ``TargetGram`` over the held-out calibration windows only."""

    windows = "held_out"


class FittedTargetGram(TargetGram):
    """A ``TargetGram`` over the windows that are not held out."""

    windows = "fitted"


class UnitGram(Gram):
    """A ``Gram`` with one block for each unit: small, and sufficient for scores of single units."""

    @classmethod
    def of(cls, site: Site) -> Self:
        """Build the empty statistic of a site: one block for each unit."""
        return cls(site.channels, site.units)


def _add_products_(total: Tensor, rows: Tensor) -> None:
    """Add the products x'x of rows [blocks, rows, width] to their sums [blocks, width, width], in place.

    Only one half of a wide product is computed, in strips; the other half is the same.
    """
    width = rows.shape[2]
    if len(rows) > 1 or width < 64 * STRIPS:
        total += rows.mT @ rows
        return
    for start, stop in itertools.pairwise(width * strip // STRIPS for strip in range(STRIPS + 1)):
        strip = rows[0, :, start:].T @ rows[0, :, start:stop]
        total[0, start:, start:stop] += strip
        total[0, start:stop, stop:] += strip[stop - start :].T


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
