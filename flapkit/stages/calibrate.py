"""Calibration: find what was measured before, and measure the rest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from flapkit.cache import Calibrated, read_statistic, write_statistic
from flapkit.calibration import Statistics
from flapkit.sites import Site
from flapkit.stages.loops import Loops, calibrate, calibration_data
from flapkit.stages.text import RunText
from flapkit.statistics import SiteStatistics, Statistic

log = logging.getLogger(__name__)


def find_statistics(
    model: PreTrainedModel,
    sites: Sequence[Site],
    statistics: Sequence[type[Statistic]],
    text: RunText,
    loops: Loops,
    cache: Path | None,
) -> Statistics:
    """Find statistics in the cache; what is not there is measured, all in one pass, and kept.

    Args:
        model: the dense model.
        sites: where to measure.
        statistics: what is needed, as classes.
        text: the calibration text.
        loops: what calibration runs on.
        cache: the cache's folder; None to measure everything, and to keep nothing.

    Raises:
        CalibrationError: an input that is not finite.
    """
    if cache is None or not statistics:
        return calibrate(model, sites, statistics, text, loops)
    with loops.progress.stage("find statistics"):
        calibrated = Calibrated.of(model, sites, calibration_data(text).calibration_rows(), loops.numerics)
        known = {statistic: read_statistic(cache, calibrated, statistic, loops.device) for statistic in statistics}
    found = {statistic: states for statistic, states in known.items() if states is not None}
    missing = [statistic for statistic in statistics if statistic not in found]
    measured = calibrate(model, sites, missing, text, loops)
    for statistic in missing:
        found[statistic] = {site.name: measured[site.name][statistic] for site in sites}
        write_statistic(cache, calibrated, statistic, found[statistic])
    if not missing:
        log.info("calibration: every statistic was found in %s; --no-cache measures anew", cache)
    return {site.name: SiteStatistics(found[statistic][site.name] for statistic in statistics) for site in sites}
