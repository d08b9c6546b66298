"""Pruning in passes: the statistics of all sites do not fit in memory together, or some sites wait for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from flapkit.execution.resume import Keep, Record, Repair, make_without_store
from flapkit.model.plan import Budget, PruningPlan
from flapkit.model.site import Site
from flapkit.model.surgery import carry_out_
from flapkit.pruning.collector import Statistics
from flapkit.pruning.components import TrialSearcher, corrector_of, needed_statistics
from flapkit.pruning.method import Method, Pruned, expect_errors, find_corrections, find_plan, notes_of, score_sites
from flapkit.pruning.sequential import GatherBehind, correct_in_sequence
from flapkit.pruning.statistics import Statistic
from flapkit.system.errors import RecipeError

Gather = Callable[[Sequence[Site], Sequence[type[Statistic]]], Statistics]
"""Measures statistics at some sites: runs the calibration text through the dense model."""


def prune_in_passes_(
    model: PreTrainedModel,
    sites: Sequence[Site],
    gather: Gather,
    method: Method,
    budget: Budget,
    memory: int,
    gather_behind: GatherBehind | None = None,
    keep: Keep = make_without_store,
) -> Pruned:
    """Prune a model in place, measuring a few sites at a time, so that their statistics fit in memory.

    First come the scores, then the plan, then the corrections: only scores, and the new weights of consumers, are kept
    from one pass over the calibration text to the next. The result is that of ``prune_sites_``.

    Args:
        model: the dense model.
        sites: its sites.
        gather: measures statistics at some of the sites.
        method: the components.
        budget: how much to remove.
        memory: bytes of statistics at a time.
        gather_behind: for sequential calibration: corrections are then found site by site, each in a model whose
            earlier sites are pruned.
        keep: finds what a stopped run has finished, and keeps what this one finishes.

    Raises:
        RecipeError: the searcher tries plans, which would calibrate once more for each.
        FlapkitError: whatever else keeps the model from being pruned; it is then as it was.
    """
    if isinstance(method.searcher, TrialSearcher):
        raise RecipeError(
            f"searcher {method.searcher.name!r} tries plans, which needs the statistics of all sites in memory "
            "together; set calibration.statistics_memory higher, and leave calibration.sequential out"
        )
    scores: dict[str, Tensor] = {}
    needed = method.scoring
    for part in split_by_memory(sites, needed, memory) if method.searcher.uses_scores else ():
        make = partial(_score, model, part, gather, method)
        scores |= keep(f"scores from {part[0].name}", make).tensors
    plan = find_plan(sites, scores, method.searcher, budget)
    pieces = []
    if gather_behind is not None:
        pieces = correct_in_sequence(model, sites, gather_behind, method.compensators, plan, keep)
    else:
        needed = needed_statistics(method.compensators)
        for part in split_by_memory([site for site in sites if plan.removed_units(site)], needed, memory):
            make = partial(_repair, model, part, gather, method, plan)
            pieces.append(Repair.of(keep(f"repair from {part[0].name}", make)))
    corrections = {name: each for piece in pieces for name, each in piece.corrections.items()}
    expected = {name: each for piece in pieces for name, each in piece.expected.items()}
    carry_out_(model, sites, plan, corrections)
    return Pruned(scores, plan, notes_of(corrections), expected)


def _score(model: PreTrainedModel, part: Sequence[Site], gather: Gather, method: Method) -> Record:
    return Record(score_sites(model, part, gather(part, method.scoring), method.metric))


def _repair(model: PreTrainedModel, part: Sequence[Site], gather: Gather, method: Method, plan: PruningPlan) -> Record:
    statistics = gather(part, needed_statistics(method.compensators))
    corrections = find_corrections(model, part, statistics, method.compensators, plan)
    return Repair(corrections, expect_errors(model, part, statistics, plan, corrections)).piece()


def count_passes(sites: Sequence[Site], method: Method, memory: int, *, sequential: bool = False) -> int:
    """Count how often the calibration text runs through the model, if every site loses units.

    Args:
        sites: the model's sites.
        method: the components.
        memory: bytes of statistics at a time.
        sequential: whether corrections are found site by site.
    """
    repair = needed_statistics(method.compensators)
    if not sequential and size_of(method.statistics, sites) <= memory:
        return int(bool(method.statistics))
    scoring = len(split_by_memory(sites, method.scoring, memory)) if method.scoring else 0
    if sequential:
        return scoring + (len(sites) if repair else 0)
    return scoring + (len(split_by_memory(sites, repair, memory)) if repair else 0)


def peak_memory(sites: Sequence[Site], method: Method, memory: int, *, sequential: bool = False) -> int:
    """Return the bytes of the most statistics that are in memory together; see ``count_passes``."""
    if not sequential and size_of(method.statistics, sites) <= memory:
        return size_of(method.statistics, sites)
    corrector = corrector_of(method.compensators)
    repair = needed_statistics(method.compensators)
    parts = [(method.scoring, part) for part in split_by_memory(sites, method.scoring, memory)]
    if sequential:
        in_sequence = corrector.measures_in_sequence() if corrector else ()
        parts += [(in_sequence, [site]) for site in sites]
    else:
        parts += [(repair, part) for part in split_by_memory(sites, repair, memory)]
    return max(size_of(statistics, part) for statistics, part in parts)


def split_by_memory(sites: Sequence[Site], statistics: Sequence[type[Statistic]], memory: int) -> list[list[Site]]:
    """Split sites, in their order, into runs whose statistics fit in memory together; a site at least in each.

    Args:
        sites: the sites.
        statistics: what is measured there, as classes.
        memory: bytes.
    """
    parts: list[list[Site]] = []
    left = 0
    for site in sites:
        size = size_of(statistics, [site])
        if not parts or size > left:
            parts.append([])
            left = memory
        parts[-1].append(site)
        left -= size
    return parts


def size_of(statistics: Sequence[type[Statistic]], sites: Sequence[Site]) -> int:
    """Return the bytes that statistics of some sites take together."""
    return sum(statistic.size_of(site) for statistic in statistics for site in sites)
