"""The prunable places of a model: what can be removed, and what goes with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True, slots=True)
class Coupling:
    """A slice of a parameter that goes with a unit.

    Unit ``u`` owns the indices ``offset + u * per_unit`` to ``offset + (u + 1) * per_unit`` of dimension ``dim``.
    A fused parameter has several couplings, one for each of its parts.

    Args:
        param: the parameter's full name in the model.
        dim: the dimension that shrinks.
        per_unit: indices that one unit owns.
        numel: parameters at one index: the product of the other dimensions.
        offset: where the first unit begins.
    """

    param: str
    dim: int
    per_unit: int
    numel: int = 1
    offset: int = 0

    @property
    def params_per_unit(self) -> int:
        """Parameters that go with one unit."""
        return self.per_unit * self.numel


@dataclass(frozen=True, slots=True)
class Site:
    """One prunable place: the attention or the MLP of one layer.

    Unit ``u`` is the channels ``u * channels_per_unit`` to ``(u + 1) * channels_per_unit`` of the consumer's input.

    Args:
        name: unique, for example ``layers.0.attention``.
        layer: index of the decoder layer.
        kind: ``attention`` or ``mlp``.
        consumer: full name of the linear whose input channels go, for example ``model.layers.0.self_attn.o_proj``.
        units: how many units there are.
        channels_per_unit: input channels of the consumer that one unit owns.
        out_features: output features of the consumer.
        couplings: what else goes with a unit.
    """

    name: str
    layer: int
    kind: Kind
    consumer: str
    units: int
    channels_per_unit: int
    out_features: int
    couplings: tuple[Coupling, ...]

    @property
    def channels(self) -> int:
        """Input channels of the consumer."""
        return self.units * self.channels_per_unit

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
