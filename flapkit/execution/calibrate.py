"""Calibration: find what was measured before, and measure the rest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from flapkit.execution.cache import Calibrated, read_statistic, write_statistic
from flapkit.execution.resume import ResumeStore, make_without_store
from flapkit.execution.runtime import Runtime, calibrate, calibrate_behind, calibration_data
from flapkit.model.plan import Budget
from flapkit.model.site import Site
from flapkit.pruning.collector import Statistics
from flapkit.pruning.method import Pruned, prune_sites_
from flapkit.pruning.passes import prune_in_passes_, size_of
from flapkit.pruning.statistics import SiteStatistics, Statistic
from flapkit.recipe import LoadedRecipe
from flapkit.run.text import RunText
from flapkit.system.processes import is_rank_zero, keep_common

log = logging.getLogger(__name__)


def calibrate_and_prune_(
    model: PreTrainedModel,
    sites: Sequence[Site],
    recipe: LoadedRecipe,
    budget: Budget,
    text: RunText,
    runtime: Runtime,
    cache: Path | None,
    kept: ResumeStore | None = None,
) -> tuple[Statistics, Pruned]:
    """Calibrate a model and prune it in place: in one pass over the calibration text where the recipe allows it.

    Args:
        model: the dense model.
        sites: its sites.
        recipe: what to do.
        budget: how much to remove.
        text: the calibration text.
        runtime: what calibration runs on.
        cache: the cache's folder, for what is measured in one pass; None to keep nothing.
        kept: what a stopped run has left, and where this one keeps what it finishes; None for nowhere.

    Returns:
        The statistics, where all were in memory together, and what was decided.
    """
    asked, method = recipe.recipe.calibration, recipe.method
    if not asked.sequential and size_of(method.statistics, sites) <= asked.statistics_bytes:
        statistics = find_statistics(model, sites, method.statistics, text, runtime, cache, kept)
        with runtime.progress.stage("prune"):
            # Lightning leaves the model on the CPU when a loop ends.
            runtime.place_(model)
            batches = calibration_data(text).predict_dataloader()
            return statistics, prune_sites_(model, sites, statistics, method, budget, batches)

    def gather(part: Sequence[Site], needed: Sequence[type[Statistic]]) -> Statistics:
        if len(part) == len(sites):
            found = find_statistics(model, sites, needed, text, runtime, cache, kept)
        else:
            found = calibrate(model, part, needed, text, runtime, kept, stop_early=True)
        runtime.place_(model)
        return found

    def gather_behind(pruned: PreTrainedModel, site: Site, needed: Sequence[type[Statistic]]) -> Statistics:
        found = calibrate_behind(model, pruned, sites, site, needed, text, runtime, kept)
        runtime.place_(model)
        return found

    behind, keep = gather_behind if asked.sequential else None, kept.find if kept else make_without_store
    with runtime.progress.stage("prune"):
        pruned = prune_in_passes_(model, sites, gather, method, budget, asked.statistics_bytes, behind, keep)
    return {site.name: SiteStatistics([]) for site in sites}, pruned


def find_statistics(
    model: PreTrainedModel,
    sites: Sequence[Site],
    statistics: Sequence[type[Statistic]],
    text: RunText,
    runtime: Runtime,
    cache: Path | None,
    kept: ResumeStore | None = None,
) -> Statistics:
    """Find statistics in the cache; what is not there is measured, all in one pass, and kept.

    Of several processes all find a statistic, or all measure it, and the first keeps it.

    Args:
        model: the dense model.
        sites: where to measure.
        statistics: what is needed, as classes.
        text: the calibration text.
        runtime: what calibration runs on.
        cache: the cache's folder; None to measure everything, and to keep nothing.
        kept: where statistics are saved while they are measured; None for nowhere.

    Raises:
        CalibrationError: an input that is not finite.
    """
    if cache is None or not statistics:
        return calibrate(model, sites, statistics, text, runtime, kept)
    with runtime.progress.stage("find statistics"):
        calibrated = Calibrated.of(model, sites, calibration_data(text).calibration_rows(), runtime.numerics)
        known = {statistic: read_statistic(cache, calibrated, statistic, runtime.device) for statistic in statistics}
    found = keep_common(known)
    missing = [statistic for statistic in statistics if statistic not in found]
    measured = calibrate(model, sites, missing, text, runtime, kept)
    for statistic in missing:
        found[statistic] = {site.name: measured[site.name][statistic] for site in sites}
        if is_rank_zero():
            write_statistic(cache, calibrated, statistic, found[statistic])
    if not missing:
        log.info("calibration: every statistic was found in %s; --no-cache measures anew", cache)
    return {site.name: SiteStatistics(found[statistic][site.name] for statistic in statistics) for site in sites}
