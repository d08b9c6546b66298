"""From statistics to scores, plan and corrections: one function for each stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.model.surgery import Correction, weight_of
from flapkit.pruning.collector import Statistics
from flapkit.pruning.components import (
    Compensator,
    ImportanceMetric,
    Objective,
    StructureSearcher,
    TrainedSearcher,
    TrialSearcher,
    corrector_of,
    needed_statistics,
)
from flapkit.pruning.moments import Moments
from flapkit.pruning.rounding import can_share, round_plan
from flapkit.pruning.site_errors import predict_squared_error
from flapkit.pruning.statistics import Statistic
from flapkit.system.errors import BudgetError, CalibrationError, FlapkitError, InputError, PluginError, RecipeError
from flapkit.system.float64 import with_float64
from flapkit.system.sizes import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Learn = Callable[[TrainedSearcher, Sequence[Site], Mapping[str, Tensor]], PruningPlan]
"""Trains the gates of a searcher, given the prunable sites and their scores [units, k]."""

FEW_TOKENS = 128
"""An expert that receives fewer calibration tokens causes a warning."""


@dataclass(frozen=True)
class Method:
    """The components that prune.

    Args:
        metric: scores the units.
        searcher: chooses the units to keep.
        compensators: repair the loss; at most one overrides ``correct``.
    """

    metric: ImportanceMetric
    searcher: StructureSearcher
    compensators: tuple[Compensator, ...]

    @property
    def judges(self) -> bool:
        """Whether the searcher judges plans on the held-out windows, which none of its statistics may have seen."""
        return isinstance(self.searcher, (TrialSearcher, TrainedSearcher))

    @property
    def adds_bias(self) -> bool:
        """Whether the corrections add biases to the consumers that have none."""
        return any(compensator.adds_bias for compensator in self.compensators)

    @property
    def scoring(self) -> tuple[type[Statistic], ...]:
        """The statistics to measure for the scores and for a searcher that trains."""
        scoring = self.metric.measures() if self.searcher.uses_scores else ()
        training = self.searcher.measures() if isinstance(self.searcher, TrainedSearcher) else ()
        return tuple(dict.fromkeys([*scoring, *training]))

    @property
    def repairing(self) -> tuple[type[Statistic], ...]:
        """The statistics to measure for the corrections."""
        return needed_statistics(self.compensators)

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """All statistics to measure, without duplicates."""
        return tuple(dict.fromkeys([*self.scoring, *self.repairing]))


@dataclass(frozen=True, slots=True)
class Repairs:
    """The repair of some sites.

    Args:
        corrections: site name -> the consumer's correction.
        expected: site name -> predicted squared error of the consumer's output per token; None where the statistics do
            not allow a prediction.
    """

    corrections: Mapping[str, Correction] = field(default_factory=dict)
    expected: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def notes(self) -> dict[str, str]:
        """Site name -> what the compensator reports about it."""
        return {name: correction.note for name, correction in self.corrections.items() if correction.note}

    def merged(self, other: Repairs) -> Repairs:
        """Return the repairs of both."""
        return Repairs({**self.corrections, **other.corrections}, {**self.expected, **other.expected})


@dataclass(frozen=True, slots=True)
class Pruned:
    """The result of pruning a model.

    Args:
        scores: site name -> scores [units, k], float64 on the CPU; empty where the searcher uses none.
        plan: the applied plan.
        notes: site name -> the compensator's remark about it.
        expected: site name -> predicted squared error of the consumer's output per token; None where the statistics do
            not allow a prediction.
        search: the course of a search by trials or training, for ``result.json``; empty otherwise.
    """

    scores: Mapping[str, Tensor] = field(repr=False)
    plan: PruningPlan
    notes: Mapping[str, str] = field(default_factory=dict)
    expected: Mapping[str, float | None] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def _as_plugin_error(where: str) -> Iterator[None]:
    """Turn an unexpected exception inside a component into one error that names the component and the site."""
    try:
        yield
    except (FlapkitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise PluginError(f"{where}: {type(error).__name__}: {error}") from error


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
    check_experts(sites, statistics)
    for site in sites:
        weight = with_float64(weight_of(model, site))
        with _as_plugin_error(f"metric {metric.name!r} at {site.name}"):
            score = metric.score(site, statistics[site.name].only(metric.measures()), weight)
        shapes = [(site.units, site.channels_per_unit), (site.units, 1)]
        shape = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        if shape not in shapes:
            allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise PluginError(f"metric {metric.name!r} at {site.name}: expected scores {allowed}, got {shape}")
        if not torch.isfinite(score).all():
            raise PluginError(f"metric {metric.name!r} at {site.name}: some scores are not finite")
        scores[site.name] = score.double().cpu()
    if equal := [name for name, score in scores.items() if score.numel() > 1 and score.max() == score.min()]:
        log.warning(
            "scores: metric %r gives all units of a site the same score at %s; AL-AM ranks them as average",
            metric.name,
            ", ".join(equal[:3]) + (f" and {len(equal) - 3} more" if len(equal) > 3 else ""),
        )
    return scores


def check_scored(metric: ImportanceMetric, sites: Sequence[Site]) -> None:
    """Refuse a metric that scores channels alone where whole experts are units.

    Raises:
        RecipeError: it cannot score a mixture.
    """
    mixtures = [site.name for site in sites if site.kind == "mixture"]
    if mixtures and not metric.scores_experts:
        raise RecipeError(
            f"metric {metric.name!r} does not score whole experts, the units of {mixtures[0]}; choose reap, or "
            "another metric for experts (docs/how-to/remove-experts.md)"
        )


def check_nested(searcher: StructureSearcher, sites: Sequence[Site]) -> None:
    """Refuse a searcher that cannot choose whole experts and channels of the others together.

    Raises:
        RecipeError: it cannot, and both are units.
    """
    if not searcher.takes_nested and any(site.nested for site in sites):
        raise RecipeError(
            f"searcher {searcher.name!r} does not choose whole experts and channels of the others in one plan "
            "(expert_unit: both); choose al_am or per_parameter, or prune twice (docs/how-to/remove-experts.md)"
        )


def check_states(statistics: Sequence[type[Statistic]], sites: Sequence[Site]) -> None:
    """Refuse statistics without a state: they could not be merged over processes, cached, or counted in memory.

    Raises:
        PluginError: one of them has none.
    """
    for statistic in statistics if sites else ():
        if not statistic.of(sites[0]).state:
            raise PluginError(
                f"statistic {statistic.__name__!r} has no state; declare each tensor that it keeps in __init__: "
                "self.add_state(name, tensor)"
            )


def check_experts(sites: Sequence[Site], statistics: Statistics) -> None:
    """Refuse experts that received too few calibration tokens, and warn of those that received few.

    Raises:
        CalibrationError: an expert received fewer than two tokens, so that its variance is undefined.
    """
    few = {}
    for site in sites:
        if site.expert is not None and Moments in statistics[site.name]:
            few[site.name] = statistics[site.name][Moments].tokens
    if unseen := [name for name, tokens in few.items() if tokens < 2]:
        raise CalibrationError(
            f"calibration: {counted(len(unseen), 'expert')} received fewer than two tokens (first: {unseen[0]}); "
            "use more text (calibration.samples)"
        )
    rare = {name: tokens for name, tokens in few.items() if tokens < FEW_TOKENS}
    if rare:
        name = min(rare, key=rare.__getitem__)
        log.warning(
            "calibration: %d of %d experts received fewer than %d tokens (fewest: %s, %d); their scores are uncertain",
            len(rare),
            len(few),
            FEW_TOKENS,
            name,
            rare[name],
        )


def find_plan(
    sites: Sequence[Site],
    scores: Mapping[str, Tensor],
    searcher: StructureSearcher,
    budget: Budget,
    objective: Objective | None = None,
    learn: Learn | None = None,
) -> PruningPlan:
    """Let a searcher choose the units to keep; sites outside the budget keep all of theirs.

    Args:
        sites: the model's sites.
        scores: site name -> scores [units, k].
        searcher: chooses the units.
        budget: how much to remove.
        objective: what a ``TrialSearcher`` minimises; if None, it runs no trials and returns the plan that it would
            start from.
        learn: trains the gates of a ``TrainedSearcher``; if None, it returns the plan that they would start from.

    Raises:
        BudgetError: the budget cannot be met.
        PluginError: the searcher's plan does not fit the sites, or misses the budget.
    """
    if budget.amount == 0:
        return PruningPlan({site.name: tuple(range(site.units)) for site in sites})
    pruned = budget.prunable(sites)
    where = f"searcher {searcher.name!r}"
    known = {site.name: scores[site.name] for site in pruned if site.name in scores}
    if objective is not None and isinstance(searcher, TrialSearcher):
        value = objective

        def judge(plans: Sequence[PruningPlan], share: float = 1.0) -> list[float]:
            return value([_complete(plan, pruned, sites, searcher, known, budget) for plan in plans], share)

        with _as_plugin_error(where):
            plan = searcher.search_by_trials(pruned, known, budget, judge)
    elif learn is not None and isinstance(searcher, TrainedSearcher):
        with _as_plugin_error(where):
            plan = learn(searcher, pruned, known)
    else:
        with _as_plugin_error(where):
            plan = searcher.search(pruned, known, budget)
    return _complete(plan, pruned, sites, searcher, known, budget)


def _complete(
    plan: PruningPlan,
    pruned: Sequence[Site],
    sites: Sequence[Site],
    searcher: StructureSearcher,
    scores: Mapping[str, Tensor],
    budget: Budget,
) -> PruningPlan:
    """Check a searcher's plan, round it, and add the sites outside the budget, which keep all of their units."""
    where = f"searcher {searcher.name!r}"
    if not isinstance(plan, PruningPlan):
        raise PluginError(f"{where}: expected a PruningPlan, got a {type(plan).__name__}")
    try:
        plan.check(pruned)
    except InputError as error:
        raise PluginError(f"{where}: {error}") from error
    cost, tolerance = budget.cost, searcher.tolerance(pruned, budget)
    removed = cost.removed(pruned, plan)
    if abs(removed - budget.amount) > tolerance:
        raise PluginError(
            f"{where}: its plan removes {cost.say(removed)} ({removed / budget.base:.2%} of "
            f"{'the model' if budget.asked else budget.of}), but the budget is {budget.amount:,} ({budget.ratio:.2%}); "
            f"it may miss the budget by {tolerance:,}: one unit, unless the searcher overrides `tolerance`"
        )
    if not budget.rounding.any_size:
        _check_unpruned(sites, pruned, budget)
        plan = round_plan(pruned, plan, scores, budget.rounding, cost=cost)
    complete = PruningPlan({site.name: plan.keep.get(site.name, tuple(range(site.units))) for site in sites})
    try:
        complete.check_left(sites)
    except InputError as error:
        raise PluginError(f"{where}: {error}") from error
    return complete


def _check_unpruned(sites: Sequence[Site], pruned: Sequence[Site], budget: Budget) -> None:
    """Raise ``BudgetError`` if sites outside the budget cannot be shared, or have too many numbers of heads."""
    whole = {site.kv_heads for site in sites if site.kind == "attention" and site not in pruned}
    if len(whole) > budget.rounding.head_counts > 0:
        raise BudgetError(
            f"budget.head_counts: the attentions have {len(whole)} different numbers of key/value heads already, "
            f"and budget.{budget.asked or f'of: {budget.of}'} does not prune them"
        )
    for site in sites:
        if site not in pruned and not can_share(site, site.units, budget.rounding.tensor_parallel):
            raise BudgetError(
                f"budget.tensor_parallel: {budget.rounding.tensor_parallel} devices cannot share {site.name}, and "
                f"budget.{budget.asked or f'of: {budget.of}'} does not prune it"
            )


def repair_sites(
    model: PreTrainedModel,
    sites: Sequence[Site],
    statistics: Statistics,
    compensators: Sequence[Compensator],
    plan: PruningPlan,
) -> Repairs:
    """Compute the corrections of some sites, and predict the error that remains.

    Args:
        model: the dense model, with the weights of these sites in memory.
        sites: some of its sites.
        statistics: site name -> its statistics.
        compensators: at most one corrects.
        plan: the units to keep.

    Raises:
        FlapkitError: a correction cannot be computed, or does not fit.
    """
    corrections = find_corrections(model, sites, statistics, compensators, plan)
    return Repairs(corrections, expect_errors(model, sites, statistics, plan, corrections))


@torch.no_grad()
def find_corrections(
    model: PreTrainedModel,
    sites: Sequence[Site],
    statistics: Statistics,
    compensators: Sequence[Compensator],
    plan: PruningPlan,
) -> dict[str, Correction]:
    """Compute the correction of every site that loses units, except mixtures.

    A mixture that loses experts sends their tokens to others, so that no linear is left to fit.

    Raises:
        PluginError: a correction has a wrong shape, or is not finite.
        RecipeError: several compensators correct.
    """
    compensator = corrector_of(compensators)
    if compensator is None:
        return {}
    corrections = {}
    for site in sites:
        keep = plan.keep[site.name]
        if not _loses_channels(site, plan):
            continue
        weight = with_float64(weight_of(model, site))
        where = f"compensator {compensator.name!r} at {site.name}"
        visible = statistics[site.name].only([*compensator.measures(), *compensator.measures_in_sequence()])
        with _as_plugin_error(where):
            correction = compensator.correct(site, visible, weight, keep)
        if not isinstance(correction, Correction):
            raise PluginError(f"{where}: expected a Correction, got a {type(correction).__name__}")
        expected = {"weight": (site.out_features, len(keep) * site.channels_per_unit), "bias": (site.out_features,)}
        for part, shape in expected.items():
            tensor = getattr(correction, part)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise PluginError(f"{where}: expected a {part} {list(shape)}, got {list(tensor.shape)}")
            if not torch.isfinite(tensor).all():
                raise PluginError(f"{where}: its {part} is not finite")
        if correction.note:
            log.info("%s: %s", site.name, correction.note)
        # Corrections may be float64, and all stay in memory until the model is sliced: cast them now.
        cast = None if correction.weight is None else correction.weight.to(weight.dtype)
        corrections[site.name] = replace(correction, weight=cast)
    return corrections


def expect_errors(
    model: PreTrainedModel,
    sites: Sequence[Site],
    statistics: Statistics,
    plan: PruningPlan,
    corrections: Mapping[str, Correction],
) -> dict[str, float | None]:
    """Predict the error of the consumer's output at every site that loses units.

    Returns:
        Site name -> squared error per token, or None where the statistics do not allow a prediction.
    """
    return {
        site.name: predict_squared_error(
            site,
            statistics[site.name],
            with_float64(weight_of(model, site)),
            plan.keep[site.name],
            corrections.get(site.name, Correction()),
        )
        for site in sites
        if _loses_channels(site, plan)
    }


def _loses_channels(site: Site, plan: PruningPlan) -> bool:
    """Tell whether a site loses channels and stays; a mixture has none, and a removed expert goes with it."""
    keep = plan.keep[site.name]
    return len(keep) < site.units and site.kind != "mixture" and not (site.within and not keep)
