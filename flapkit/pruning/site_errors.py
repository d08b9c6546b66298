"""How far a consumer's output moves when its site is pruned: predicted from statistics, and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.model.surgery import Correction, bias_of, weight_of
from flapkit.pruning.collector import Batch, Statistics
from flapkit.pruning.statistics import FittedGram, Gram, HeldOutGram, Moments, SiteStatistics, Spread, Statistic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_TRACE = 2**26
"""Bytes of inputs and outputs that a trace keeps at most: 64 MiB."""

FEWEST_TRACED = 64
"""Tokens that a trace keeps at least, whatever they take."""


@dataclass(frozen=True, slots=True)
class SiteError:
    """How far a site's consumer is from the dense one: root of the squared error over the squared output.

    Both squares are summed over tokens and output features; 0 is the dense model, 1 an output of nothing.

    Args:
        predicted: from the calibration statistics; None where they do not allow it.
        alone: measured, with the dense model's own input: what pruning this site does.
        in_model: measured in the pruned model, with the errors of the sites before it; None where the tokens that
            reach the site are others than in the dense model (experts).
    """

    predicted: float | None
    alone: float
    in_model: float | None


@torch.no_grad()
def predict_squared_error(
    site: Site, stats: SiteStatistics, weight: Tensor, keep: Sequence[int], correction: Correction
) -> float | None:
    """Predict the squared error of a consumer's output per token, on text like the calibration text.

    With D the change of the weight (the removed columns, less what a correction adds to the kept ones) and b the added
    bias it is E|D x - b|² = tr(D Cov(x) D') + |D E[x] - b|². Where moments alone were measured, channels are taken as
    uncorrelated, and the first term is FLAP's own sum of scores: Σ Var(x_j) |D_:j|² (arXiv 2312.11983, equation 5).

    Args:
        site: the place that is pruned.
        stats: what was measured there.
        weight: the consumer's dense weight [out_features, channels].
        keep: the kept units, ascending.
        correction: what a compensator does to the consumer.

    Returns:
        The error, or None where neither a Gram nor moments were measured.
    """
    gram = _gram_of(stats)
    if gram is None and Moments not in stats:
        return None
    kept = site.channels_of(keep)
    change = weight.float().clone()
    change[:, kept] -= weight[:, kept].float() if correction.weight is None else correction.weight.to(change)
    mean = stats[Moments].mean if gram is None else gram.mean
    shift = change @ mean.to(change)
    if correction.bias is not None:
        shift -= correction.bias.to(change)
    if gram is None:
        # The covariance's diagonal alone.
        moved = change.square().sum(dim=0) @ stats[Moments].variance.to(change)
    else:
        moved = ((change @ (gram.squares[0] / gram.tokens.to(gram.squares)).to(change)) * change).sum()
    return float(moved + shift.square().sum())


def _gram_of(stats: SiteStatistics) -> Spread | None:
    """Return what Gram matrices of all the text, or of its two parts, tell of the inputs."""
    if Gram in stats:
        return stats[Gram].spread
    if FittedGram in stats and HeldOutGram in stats:
        return stats[FittedGram].spread.merged(stats[HeldOutGram].spread)
    return None


class _Inputs(Statistic):
    """The inputs themselves, of the first ``most`` tokens that come."""

    most: ClassVar[int]

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.rows: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Keep ``x`` [tokens, channels] while there is room."""
        room = self.most - sum(map(len, self.rows))
        self.rows.append(x[:room].cpu())

    @property
    def inputs(self) -> Tensor:
        """The inputs [tokens, channels]."""
        return torch.cat(self.rows) if self.rows else torch.empty(0, self.channels)

    def is_finite(self) -> bool:
        """Tell whether all inputs are finite."""
        return all(bool(torch.isfinite(rows).all()) for rows in self.rows)


def _inputs_up_to(tokens: int) -> type[_Inputs]:
    # Statistics are chosen by class, so the limit is a class's.
    return type("_Inputs", (_Inputs,), {"most": tokens})


def trace_tokens(sites: Sequence[Site], windows: int, length: int, size: int) -> int:
    """Return how many tokens a trace compares.

    Args:
        sites: the dense model's sites.
        windows: windows of text.
        length: tokens of a window.
        size: bytes of one of the model's numbers.
    """
    each = sum(site.channels + 2 * site.out_features for site in sites) * size
    return min(windows * length, max(LARGEST_TRACE // each, FEWEST_TRACED))


class Trace:
    """What the dense model's consumers take in and give out on a little text, to compare the pruned model with.

    Let ``statistic`` be measured on ``batches`` and shown to ``see``, of all sites or of a few at a time; then once
    more in the pruned model, at the sites of ``left``, and shown to ``compare``.

    Args:
        sites: the dense model's sites.
        windows: the text, tokens [windows, tokens].
        dtype: of the model.
        batch_size: windows that go through the model at once.

    Attributes:
        batches: the text.
        statistic: what is to be measured.
        tokens: tokens that are compared, at most; fewer than the text's where they would take too much memory.
    """

    def __init__(self, sites: Sequence[Site], windows: Tensor, dtype: torch.dtype, batch_size: int = 8) -> None:
        self._sites = {site.name: site for site in sites}
        # Several sites of a kind in a layer are experts: other tokens reach them in the pruned model.
        self._alike = Counter((site.layer, site.kind) for site in sites)
        self.batches: list[Batch] = [{"input_ids": part} for part in windows.split(batch_size)]
        self.tokens = trace_tokens(sites, windows.shape[0], windows.shape[1], dtype.itemsize)
        self.statistic = _inputs_up_to(self.tokens)
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(self, model: PreTrainedModel, measured: Statistics) -> None:
        """Take in what was measured of the dense model at some sites, whose weights it has in memory."""
        for name, found in measured.items():
            inputs = found[self.statistic].inputs
            self._seen[name] = inputs, _output(model, self._sites[name], inputs)

    def left(self, plan: PruningPlan, sites: Sequence[Site]) -> list[Site]:
        """List what a plan leaves of some sites."""
        return [replace(site, units=len(plan.keep[site.name]), couplings=()) for site in sites]

    def compare(
        self, model: PreTrainedModel, measured: Statistics, plan: PruningPlan, predicted: Mapping[str, float | None]
    ) -> dict[str, SiteError]:
        """Compare the pruned model, at those of some sites that lost units.

        Args:
            model: the pruned model, which has the weights of these sites in memory.
            measured: site name -> what was measured there.
            plan: what it keeps.
            predicted: site name -> predicted squared error per token, or None.
        """
        errors = {}
        for name, found in measured.items():
            dense, (inputs, wanted) = self._sites[name], self._seen[name]
            (site,) = self.left(plan, [dense])
            power = float(wanted.square().sum()) / max(len(wanted), 1)
            if site.units == dense.units or not power:
                continue
            alone = inputs[:, dense.channels_of(plan.keep[name])]
            expected = predicted.get(name)
            same = self._alike[site.layer, site.kind] == 1
            now = found[self.statistic].inputs
            errors[name] = SiteError(
                predicted=None if expected is None else (expected / power) ** 0.5,
                alone=_relative_error(_output(model, site, alone), wanted),
                in_model=_relative_error(_output(model, site, now), wanted) if same else None,
            )
        return errors


@torch.no_grad()
def _output(model: PreTrainedModel, site: Site, x: Tensor) -> Tensor:
    """Apply a site's consumer to inputs [tokens, channels]; float32 on the CPU."""
    weight, bias = weight_of(model, site), bias_of(model, site)
    return functional.linear(x.to(weight), weight, bias).float().cpu()


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
