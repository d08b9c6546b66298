"""The angles by which layers turn the hidden states."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from flapkit.model.site import Site
from flapkit.pruning.statistics import LayerStatistic


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
