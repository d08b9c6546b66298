"""What calibration measures about a consumer's input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

from flapkit.model.site import Site
from flapkit.system.processes import gather_tensors

S = TypeVar("S", bound="Statistic")


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
