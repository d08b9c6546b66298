"""Sites and couplings: what can be removed from a model, and what goes with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from flapkit.model.declaration import Block
from flapkit.system.sizes import counted

Kind = Literal["attention", "mlp", "mixture"]


@dataclass(frozen=True, slots=True)
class Coupling:
    """A slice of a parameter that goes with a unit.

    Unit ``u`` owns ``per_unit`` indices of dimension ``dim``, from ``offset + u * per_unit`` on. With a ``stride``,
    units come in runs of ``run`` contiguous units, and the next run starts one stride later. A fused parameter has
    several couplings, one for each of its parts.

    Args:
        param: the parameter's full name in the model.
        dim: the dimension that shrinks.
        per_unit: indices that one unit owns.
        numel: parameters per index: the product of the other dimensions; for stacked experts, of one expert; 0 for a
            buffer, which is no parameter.
        offset: first index of the first unit.
        run: number of contiguous units.
        stride: indices from one run of units to the next; 0 if all units are contiguous.
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
        """Yield the indices of the given units, in the units' order."""
        for unit in units:
            yield from range(self.start(unit), self.start(unit) + self.per_unit)


@dataclass(frozen=True, slots=True)
class Site:
    """One prunable part of a model: the attention, the MLP or the mixture of experts of one layer, or one expert of it.

    Unit ``u`` owns the channels ``u * channels_per_unit`` to ``(u + 1) * channels_per_unit`` of the consumer's input.

    A unit of a mixture is a whole expert. Its consumer is the stack of all experts' last weights, each one column; the
    input of that column is the expert's contribution: its router weight times the norm of its output, or 0 for tokens
    that are not routed to it.

    Args:
        name: unique name, for example ``layers.0.attention``.
        layer: index of the decoder layer.
        kind: ``attention``, ``mlp`` or ``mixture``; an expert is an MLP.
        consumer: full name of the linear whose input channels are removed, for example
            ``model.layers.0.self_attn.o_proj``; for an expert or a mixture, the parameter that stacks all experts.
        units: number of units.
        channels_per_unit: input channels of the consumer that one unit owns.
        out_features: output features of the consumer.
        couplings: slices of other parameters that go with a unit.
        dim: the dimension of the consumer's weight that counts its input channels.
        expert: index of the expert in the stack; None for other sites.
        group: name shared by sites that must keep the same number of units, such as the experts of a layer.
        runs: number of equal runs of units, each of which must keep the same number of units: the query heads of each
            key/value head, the experts of each group of a router.
        least: units that have to stay: the experts of a token, 1 elsewhere.
        multiple: kernels are faster if the number of kept units is a multiple of this.
        heads: query heads of an attention site.
        kv_heads: key/value heads of an attention site.
        rest: parameters that belong to no unit, and go with the last one: norms of heads, keys and values that all
            query heads share.
        removable: whether all units can go; the bias of the consumer stays.
        one_of: name shared by sites of which the model needs at least one: the attentions of a type of layers.
        within: of an expert, the name of the mixture that can lose it whole in the same pruning; empty otherwise.
        nested: of a mixture, parameters of a unit that are units of their own: the channels of an expert.
        path: full name of the block's module.
        block: the declaration that the site comes from.
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
    least: int = 1
    multiple: int = 1
    heads: int = 0
    kv_heads: int = 0
    rest: int = 0
    removable: bool = False
    one_of: str = ""
    within: str = ""
    nested: int = 0
    path: str = ""
    block: Block | None = field(default=None, hash=False)

    def __repr__(self) -> str:
        """Return the name and the size."""
        size = f"{counted(self.units, 'unit')} of {counted(self.channels_per_unit, 'channel')}"
        return f"Site({self.name!r}, {size}, {counted(self.params, 'parameter')})"

    @property
    def units_per_run(self) -> int:
        """Units of one run."""
        return self.units // self.runs

    @property
    def step(self) -> int:
        """Units of a run that are removed together: ``multiple`` of an MLP, one of an attention."""
        return self.multiple if self.kind == "mlp" else 1

    @property
    def stacked(self) -> bool:
        """Whether the consumer is a parameter that stacks all experts, and no linear."""
        return self.expert is not None or self.kind == "mixture"

    @property
    def channels(self) -> int:
        """Input channels of the consumer."""
        return self.units * self.channels_per_unit

    @property
    def weight(self) -> str:
        """Full name of the consumer's weight."""
        return self.consumer if self.stacked else f"{self.consumer}.weight"

    @property
    def bias(self) -> str:
        """Full name of the consumer's bias, whether or not it exists."""
        return f"{self.consumer}_bias" if self.stacked else f"{self.consumer}.bias"

    @property
    def params_per_unit(self) -> int:
        """Parameters removed with one unit: the consumer's columns and all coupled slices, less what is nested."""
        own = self.channels_per_unit * self.out_features + sum(c.params_per_unit for c in self.couplings)
        return own - self.nested

    @property
    def params(self) -> int:
        """Parameters of all units, and the rest: the same number whatever the unit."""
        return self.units * self.params_per_unit + self.rest

    def removed_params(self, kept: int) -> int:
        """Return the parameters that go if the site keeps a number of units."""
        return (self.units - kept) * self.params_per_unit if kept else self.params

    @property
    def layer_path(self) -> str:
        """Full name of the decoder layer's module."""
        return self.path.removesuffix(f".{self.block.path}") if self.block and self.block.path else self.path

    def channels_of(self, units: Iterable[int]) -> list[int]:
        """Return the consumer's input channels of the given units, in the units' order."""
        width = self.channels_per_unit
        return [channel for unit in units for channel in range(unit * width, (unit + 1) * width)]

    def heads_of(self, units: Iterable[int]) -> list[int]:
        """Return the query heads of the given units, in the units' order."""
        per_unit = self.heads // self.units
        return [head for unit in units for head in range(unit * per_unit, (unit + 1) * per_unit)]

    def sizes(self, units: int) -> dict[str, int]:
        """Return the sizes that a declaration's expressions use, for a number of kept units.

        Returns:
            For attention, ``H`` query heads, ``K`` key/value heads and ``D`` channels per head; for an MLP, ``I``
            channels; for a mixture, ``E`` experts.
        """
        if self.kind != "attention":
            return {"E" if self.kind == "mixture" else "I": units}
        shared = self.units != self.kv_heads and units > 0
        kv_heads = self.kv_heads if shared else self.kv_heads * units // self.units
        return {"H": self.heads * units // self.units, "K": kv_heads, "D": self.channels // self.heads}


def renumbered(together: Sequence[Site], keep: Mapping[str, Sequence[int]]) -> list[Site]:
    """Return the sites of a group that keep units; experts are counted as in a stack without those that are gone.

    Args:
        together: sites that keep the same number of units.
        keep: site name -> kept units.
    """
    left = [site for site in together if keep[site.name]]
    return [replace(site, expert=index) if site.within else site for index, site in enumerate(left)]


def groups(sites: Sequence[Site]) -> list[list[Site]]:
    """Group the sites that must keep the same number of units, in the model's order; most groups have one site."""
    members: dict[str, list[Site]] = {}
    for site in sites:
        members.setdefault(site.group or site.name, []).append(site)
    return list(members.values())
