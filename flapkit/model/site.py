"""The prunable places of a model: what can be removed, and what goes with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from flapkit.model.declaration import Block

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True, slots=True)
class Coupling:
    """A slice of a parameter that goes with a unit.

    Unit ``u`` owns ``per_unit`` indices of dimension ``dim``. They begin at ``offset + u * per_unit``; where ``stride``
    is given, every ``run`` units begin a stride further on. A fused parameter has several couplings, one for each of
    its parts.

    Args:
        param: the parameter's full name in the model.
        dim: the dimension that shrinks.
        per_unit: indices that one unit owns.
        numel: parameters at one index: the product of the other dimensions; of one expert where there are several.
        offset: where the first unit begins.
        run: units that lie side by side.
        stride: indices from one run of units to the next; 0 where all units lie side by side.
    """

    param: str
    dim: int
    per_unit: int
    numel: int = 1
    offset: int = 0
    run: int = 1
    stride: int = 0

    @property
    def params_per_unit(self) -> int:
        """Parameters that go with one unit."""
        return self.per_unit * self.numel

    def start(self, unit: int) -> int:
        """Return the first index that a unit owns."""
        if not self.stride:
            return self.offset + unit * self.per_unit
        return self.offset + unit // self.run * self.stride + unit % self.run * self.per_unit

    def indices_of(self, units: Iterable[int]) -> Iterator[int]:
        """List the indices that some units own, in the units' order."""
        for unit in units:
            yield from range(self.start(unit), self.start(unit) + self.per_unit)


@dataclass(frozen=True, slots=True)
class Site:
    """One prunable place: the attention or the MLP of one layer, or one expert of it.

    Unit ``u`` is the channels ``u * channels_per_unit`` to ``(u + 1) * channels_per_unit`` of the consumer's input.

    Args:
        name: unique, for example ``layers.0.attention``.
        layer: index of the decoder layer.
        kind: ``attention`` or ``mlp``; an expert is an MLP.
        consumer: full name of the linear whose input channels go, for example ``model.layers.0.self_attn.o_proj``; of
            an expert, the parameter that holds every expert's.
        units: how many units there are.
        channels_per_unit: input channels of the consumer that one unit owns.
        out_features: output features of the consumer.
        couplings: what else goes with a unit.
        dim: the dimension of the consumer's weight that counts its input channels.
        expert: index of the expert in a stack of them.
        group: sites of one group keep the same number of units: the experts of a layer are one tensor.
        runs: the units come in this many equal runs, each of which keeps the same number: the query heads of each
            key/value head.
        multiple: a kept number that is a multiple of this runs faster.
        heads: query heads of an attention site.
        kv_heads: its key/value heads.
        path: full name of the module that the block is.
        block: the declaration that the site comes from, which says what else has to follow the cut.
    """

    name: str
    layer: int
    kind: Kind
    consumer: str
    units: int
    channels_per_unit: int
    out_features: int
    couplings: tuple[Coupling, ...]
    dim: int = 1
    expert: int | None = None
    group: str = ""
    runs: int = 1
    multiple: int = 1
    heads: int = 0
    kv_heads: int = 0
    path: str = ""
    block: Block | None = field(default=None, hash=False)

    @property
    def channels(self) -> int:
        """Input channels of the consumer."""
        return self.units * self.channels_per_unit

    @property
    def weight(self) -> str:
        """Full name of the consumer's weight."""
        return f"{self.consumer}.weight" if self.expert is None else self.consumer

    @property
    def bias(self) -> str:
        """Full name that the consumer's bias has, or would have."""
        return f"{self.consumer}.bias" if self.expert is None else f"{self.consumer}_bias"

    @property
    def params_per_unit(self) -> int:
        """Parameters that removing one unit saves: the consumer's columns and every coupled slice."""
        return self.channels_per_unit * self.out_features + sum(c.params_per_unit for c in self.couplings)

    @property
    def params(self) -> int:
        """Parameters that removing all units would save."""
        return self.units * self.params_per_unit

    def channels_of(self, units: Iterable[int]) -> list[int]:
        """List the consumer's input channels that some units own, in the units' order."""
        width = self.channels_per_unit
        return [channel for unit in units for channel in range(unit * width, (unit + 1) * width)]

    def heads_of(self, units: Iterable[int]) -> list[int]:
        """List the query heads that some units own, in the units' order."""
        per_unit = self.heads // self.units
        return [head for unit in units for head in range(unit * per_unit, (unit + 1) * per_unit)]

    def sizes(self, units: int) -> dict[str, int]:
        """Return what an expression in a declaration can name, where so many units are kept.

        Returns:
            Of an attention site ``H`` query heads, ``K`` key/value heads and ``D`` channels of a head; of an MLP
            ``I`` channels.
        """
        if self.kind == "mlp":
            return {"I": units}
        kv_heads = self.kv_heads * units // self.units if self.units == self.kv_heads else self.kv_heads
        return {"H": self.heads * units // self.units, "K": kv_heads, "D": self.channels // self.heads}


def groups(sites: Sequence[Site]) -> list[list[Site]]:
    """Gather the sites that keep the same number of units, in the model's order; most are alone."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.group or site.name, []).append(site)
    return list(found.values())
