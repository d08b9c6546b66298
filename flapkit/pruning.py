"""Sites, scores, plan, corrections, slice: one plain function for each stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from flapkit.checkpoint.families import describe_
from flapkit.errors import CalibrationError, InputError, PluginError
from flapkit.interfaces import Compensator, Component, Correction, ImportanceMetric, StructureSearcher
from flapkit.plan import Budget, PruningPlan, prunable
from flapkit.sites import Site
from flapkit.statistics import SiteStatistics, Statistic
from flapkit.surgery import check_sites, consumer_of, slice_

Statistics = Mapping[str, SiteStatistics]
"""Site name -> what was measured there."""


def needed_statistics(components: Iterable[Component]) -> tuple[type[Statistic], ...]:
    """List the statistics that some components declare, each once."""
    return tuple(dict.fromkeys(statistic for component in components for statistic in component.statistics))


class Collector:
    """Measure statistics of the consumers' inputs while the model runs, as a context manager.

    The attention mask that the backbone is called with says which tokens count. The hooks are gone when the context
    is left, whatever happened.

    Args:
        model: the dense model.
        sites: where to measure.
        statistics: what to measure, as classes.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], statistics: Sequence[type[Statistic]]) -> None:
        self.statistics = {
            site.name: SiteStatistics([statistic(site.channels) for statistic in statistics]) for site in sites
        }
        self._model = model
        self._sites = sites
        self._attended: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Collector:
        check_sites(self._model, self._sites)
        backbone = self._model.base_model
        self._handles.append(backbone.register_forward_pre_hook(self._see_mask, with_kwargs=True))
        for site in self._sites:
            self._handles.append(consumer_of(self._model, site).register_forward_pre_hook(self._see_input(site)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._attended = None

    def check(self) -> None:
        """Raise ``CalibrationError``, which names the first layer, if anything measured so far is not finite."""
        for site in self._sites:
            if not all(statistic.is_finite() for statistic in self.statistics[site.name].values()):
                raise CalibrationError(
                    f"{site.consumer}: its input is not finite on the calibration text; "
                    "try model.dtype float32 or bfloat16, and check that the model's weights are sound"
                )

    def _see_mask(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._attended = None if mask is None else mask.bool()

    def _see_input(self, site: Site) -> Any:
        statistics = list(self.statistics[site.name].values())

        def hook(consumer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            tokens = x.flatten(0, -2) if self._attended is None else x[self._attended.to(x.device)]
            for statistic in statistics:
                statistic.to(x.device).update(tokens)

        return hook


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    sites: Sequence[Site],
    statistics: Sequence[type[Statistic]],
    batches: Iterable[Mapping[str, Tensor]],
) -> Statistics:
    """Run the backbone over calibration batches and measure the consumers' inputs.

    Args:
        model: the dense model, in evaluation mode.
        sites: where to measure.
        statistics: what to measure, as classes.
        batches: mappings with ``input_ids`` [windows, tokens] and perhaps ``attention_mask`` of the same shape.

    Raises:
        CalibrationError: an input that is not finite, or no text at all.
    """
    with Collector(model, sites, statistics) as collector:
        for batch in batches:
            run_backbone(model, batch)
            collector.check()
    return collector.statistics


def run_backbone(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Run the decoder layers on a batch, without computing logits."""
    device = next(model.get_input_embeddings().parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
    model.base_model(**inputs, use_cache=False)


@torch.no_grad()
def score_sites(
    model: PreTrainedModel, sites: Sequence[Site], statistics: Statistics, metric: ImportanceMetric
) -> dict[str, Tensor]:
    """Score every unit of every site.

    Returns:
        Site name -> scores [units, k], float64 on the CPU.

    Raises:
        PluginError: the metric returns a wrong shape, or scores that are not finite.
    """
    scores = {}
    for site in sites:
        weight = consumer_of(model, site).weight
        score = metric.score(site, statistics[site.name], weight)
        shapes = [(site.units, site.channels_per_unit), (site.units, 1)]
        found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        if found not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise PluginError(f"metric {metric.name!r} at {site.name}: expected scores {wanted}, found {found}")
        if not torch.isfinite(score).all():
            raise PluginError(f"metric {metric.name!r} at {site.name}: some scores are not finite")
        scores[site.name] = score.double().cpu()
    return scores


def find_plan(
    sites: Sequence[Site], scores: Mapping[str, Tensor], searcher: StructureSearcher, budget: Budget
) -> PruningPlan:
    """Let a searcher choose the units to keep; sites that the budget leaves out keep all of theirs.

    Raises:
        BudgetError: the budget cannot be met.
        PluginError: the searcher's plan does not fit the sites.
    """
    if budget.params == 0:
        return PruningPlan({site.name: tuple(range(site.units)) for site in sites})
    pruned = prunable(sites, budget.of)
    found = searcher.search(pruned, {site.name: scores[site.name] for site in pruned}, budget)
    try:
        found.check(pruned)
    except InputError as error:
        raise PluginError(f"searcher {searcher.name!r}: {error}") from error
    return PruningPlan({site.name: found.keep.get(site.name, tuple(range(site.units))) for site in sites})


@torch.no_grad()
def find_corrections(
    model: PreTrainedModel,
    sites: Sequence[Site],
    statistics: Statistics,
    compensator: Compensator,
    plan: PruningPlan,
) -> dict[str, Correction]:
    """Compute the correction of every site that loses units.

    Raises:
        PluginError: a correction of a wrong shape, or one that is not finite.
    """
    corrections = {}
    for site in sites:
        keep = plan.keep[site.name]
        if len(keep) == site.units:
            continue
        weight = consumer_of(model, site).weight
        correction = compensator.correct(site, statistics[site.name], weight, keep)
        expected = {"weight": (site.out_features, len(keep) * site.channels_per_unit), "bias": (site.out_features,)}
        for part, shape in expected.items():
            tensor = getattr(correction, part)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise PluginError(
                    f"compensator {compensator.name!r} at {site.name}: expected a {part} {list(shape)}, "
                    f"found {list(tensor.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise PluginError(f"compensator {compensator.name!r} at {site.name}: its {part} is not finite")
        corrections[site.name] = correction
    return corrections


def carry_out_(
    model: PreTrainedModel, sites: Sequence[Site], plan: PruningPlan, corrections: Mapping[str, Correction]
) -> None:
    """Slice the model and give it the configuration of what it has become, in place.

    Args:
        model: the dense model.
        sites: its sites.
        plan: the units to keep.
        corrections: site name -> what a compensator does to the consumer.
    """
    slice_(model, sites, plan, corrections)
    describe_(model, sites)
