"""The error of a consumer's output when its site is pruned: predicted from statistics, and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, groups, renumbered
from flapkit.model.surgery import Correction, bias_of, weight_of
from flapkit.pruning.collector import Batch, Statistics
from flapkit.pruning.gram import FittedGram, Gram, HeldOutGram
from flapkit.pruning.moments import Moments, Spread
from flapkit.pruning.statistics import SiteStatistics, Statistic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_TRACE = 2**26
"""Largest size of a trace's inputs and outputs, in bytes: 64 MiB."""

FEWEST_TRACED = 64
"""Smallest number of tokens in a trace, even where they exceed ``LARGEST_TRACE``."""


@dataclass(frozen=True, slots=True)
class SiteError:
    """Relative error of a consumer's output: the root of the squared error over the squared dense output.

    Both squares are summed over tokens and output features; 0 equals the dense model, 1 equals an output of zeros.

    Args:
        predicted: from the calibration statistics; None where they do not allow a prediction.
        alone: measured with the dense model's input: the effect of pruning this site only.
        in_model: measured in the pruned model, including the errors of the sites before it; None where other tokens
            reach the site than in the dense model (experts).
    """

    predicted: float | None
    alone: float
    in_model: float | None


@torch.no_grad()
def predict_squared_error(
    site: Site, stats: SiteStatistics, weight: Tensor, keep: Sequence[int], correction: Correction
) -> float | None:
    """Predict the squared error of a consumer's output per token, on text like the calibration text.

    Let D be the change of the weight (the removed columns, minus what a correction adds to the kept ones) and b the
    added bias. The error is E|D x - b|² = tr(D Cov(x) D') + |D E[x] - b|². If only moments were measured, channels are
    treated as uncorrelated, and the first term is FLAP's sum of scores: Σ Var(x_j) |D_:j|² (arXiv 2312.11983,
    equation 5).

    Args:
        site: the pruned site.
        stats: its statistics.
        weight: the consumer's dense weight [out_features, channels].
        keep: the kept units, ascending.
        correction: the consumer's correction.

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
    """The inputs of the first ``limit`` tokens."""

    limit: ClassVar[int]

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.rows: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Store ``x`` [tokens, channels] up to the limit."""
        room = self.limit - sum(map(len, self.rows))
        self.rows.append(x[:room].cpu())

    @property
    def inputs(self) -> Tensor:
        """The inputs [tokens, channels]."""
        return torch.cat(self.rows) if self.rows else torch.empty(0, self.channels)

    def is_finite(self) -> bool:
        """Tell whether all inputs are finite."""
        return all(bool(torch.isfinite(rows).all()) for rows in self.rows)


def _inputs_up_to(tokens: int) -> type[_Inputs]:
    # Statistics are chosen by class, so the limit is a class attribute.
    return type("_Inputs", (_Inputs,), {"limit": tokens})


def traced(sites: Sequence[Site]) -> list[Site]:
    """Return the sites whose consumers are linears, all but mixtures: only these have an output to compare."""
    return [site for site in sites if site.kind != "mixture"]


def trace_tokens(sites: Sequence[Site], windows: int, length: int, size: int) -> int:
    """Return how many tokens a trace compares.

    Args:
        sites: the dense model's sites.
        windows: windows of text.
        length: tokens of a window.
        size: bytes per element of the model's dtype.
    """
    per_token = sum(site.channels + 2 * site.out_features for site in traced(sites)) * size
    return min(windows * length, max(LARGEST_TRACE // per_token, FEWEST_TRACED))


class Trace:
    """Inputs and outputs of the dense model's consumers on a short text, to compare the pruned model with.

    Measure ``statistic`` on ``batches`` in the dense model and pass it to ``see``, for all sites or a few at a time.
    Then measure it again in the pruned model, at the sites of ``pruned_sites``, and pass it to ``compare``.

    Args:
        sites: the dense model's sites.
        windows: the text, tokens [windows, tokens].
        dtype: the model's.
        batch_size: windows that go through the model at once.

    Attributes:
        batches: the text.
        statistic: the statistic to measure.
        tokens: largest number of tokens to compare; less than the text's where that would need too much memory.
    """

    def __init__(self, sites: Sequence[Site], windows: Tensor, dtype: torch.dtype, batch_size: int = 8) -> None:
        self._sites = {site.name: site for site in traced(sites)}
        # Several sites of a kind in a layer are experts: different tokens reach them in the pruned model.
        self._alike = Counter((site.layer, site.kind) for site in sites)
        self.batches: list[Batch] = [{"input_ids": part} for part in windows.split(batch_size)]
        self.tokens = trace_tokens(sites, windows.shape[0], windows.shape[1], dtype.itemsize)
        self.statistic = _inputs_up_to(self.tokens)
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(self, model: PreTrainedModel, measured: Statistics) -> None:
        """Store what was measured in the dense model at some sites, whose weights are in memory."""
        for name, statistics in measured.items():
            inputs = statistics[self.statistic].inputs
            self._seen[name] = inputs, _output(model, self._sites[name], inputs)

    def pruned_sites(self, plan: PruningPlan, sites: Sequence[Site]) -> list[Site]:
        """Return the traced ones of some sites, with the number of units that a plan keeps; those without have gone."""
        left = [site for together in groups(traced(sites)) for site in renumbered(together, plan.keep)]
        return [replace(site, units=len(plan.keep[site.name]), couplings=()) for site in left]

    def compare(
        self, model: PreTrainedModel, measured: Statistics, plan: PruningPlan, predicted: Mapping[str, float | None]
    ) -> dict[str, SiteError]:
        """Compare the pruned model with the dense one at the sites that lost units.

        Args:
            model: the pruned model, with the weights of these sites in memory.
            measured: site name -> its statistics in the pruned model.
            plan: the units kept.
            predicted: site name -> predicted squared error per token, or None.
        """
        errors = {}
        pruned = {site.name: site for site in self.pruned_sites(plan, list(self._sites.values()))}
        for name, statistics in measured.items():
            dense, site, (inputs, outputs) = self._sites[name], pruned[name], self._seen[name]
            power = float(outputs.square().sum()) / max(len(outputs), 1)
            if site.units == dense.units or not power:
                continue
            alone = inputs[:, dense.channels_of(plan.keep[name])]
            expected = predicted.get(name)
            same = self._alike[site.layer, site.kind] == 1
            in_model = statistics[self.statistic].inputs
            errors[name] = SiteError(
                predicted=None if expected is None else (expected / power) ** 0.5,
                alone=_relative_error(_output(model, site, alone), outputs),
                in_model=_relative_error(_output(model, site, in_model), outputs) if same else None,
            )
        return errors


@torch.no_grad()
def _output(model: PreTrainedModel, site: Site, x: Tensor) -> Tensor:
    """Apply a site's consumer to inputs [tokens, channels]; float32 on the CPU."""
    weight, bias = weight_of(model, site), bias_of(model, site)
    return functional.linear(x.to(weight), weight, bias).float().cpu()


def _relative_error(pruned: Tensor, dense: Tensor) -> float:
    return float((pruned - dense).norm() / dense.norm())
