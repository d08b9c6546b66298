"""Covariances of the channels, and their products with what the consumer should put out."""

from __future__ import annotations

import itertools
from typing import ClassVar, Self

import torch
from torch import Tensor

from flapkit.model.site import Site
from flapkit.pruning.moments import Spread, SpreadStatistic, check_tokens

STRIPS = 8
"""Strips in which a symmetric product is computed: 9/16 of the multiplications of a whole one."""


class Gram(SpreadStatistic):
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
        self._is_whole = False

    @property
    def spread(self) -> Spread:
        """What was seen. Text is added to one half of wide products; the other half is filled in here."""
        spread = super().spread
        if not self._is_whole:
            _mirror_(spread.squares)
            self._is_whole = True
        return spread

    def _keep(self, spread: Spread) -> None:
        super()._keep(spread)
        self._is_whole = False

    def is_finite(self) -> bool:
        """Tell whether all inputs so far were finite: no product is larger than the squares of its channels."""
        squares = self._squares.diagonal(dim1=-2, dim2=-1) if self._squares.dim() == 3 else self._squares
        return bool(torch.isfinite(self._mean).all() and torch.isfinite(squares).all())

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
            self._is_whole = False
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
        return spread.squares / check_tokens(spread, "a covariance").to(spread.squares)


class HeldOutGram(Gram):
    """A ``Gram`` over the held-out calibration windows only, to evaluate what was fitted on the others."""

    windows = "held_out"


class FittedGram(Gram):
    """A ``Gram`` over the windows that are not held out."""

    windows = "fitted"


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


def _strips(products: Tensor) -> list[tuple[int, int]]:
    """Return the strips in which products [blocks, width, width] are computed; none where all are computed at once."""
    blocks, width, _ = products.shape
    if blocks > 1 or width < 64 * STRIPS:
        return []
    return list(itertools.pairwise(width * strip // STRIPS for strip in range(STRIPS + 1)))


def _add_products_(total: Tensor, rows: Tensor) -> None:
    """Add the products x'x of rows [blocks, rows, width] to their sums [blocks, width, width], in place.

    In strips, only the lower half is added: ``_mirror_`` fills in the upper one.
    """
    strips = _strips(total)
    if not strips:
        total += rows.mT @ rows
    for start, stop in strips:
        total[0, start:, start:stop] += rows[0, :, start:].T @ rows[0, :, start:stop]


def _mirror_(total: Tensor) -> None:
    """Copy the lower half of products that are computed in strips to the upper half, in place."""
    for start, stop in _strips(total):
        total[0, start:stop, stop:] = total[0, stop:, start:stop].T
