"""What executors need: passes over the calibration text, and memory for statistics."""

from __future__ import annotations

from collections.abc import Sequence

from flapkit.model.site import Site
from flapkit.pruning.components import corrector_of
from flapkit.pruning.method import Method
from flapkit.pruning.statistics import size_of, split_by_memory

SWEEP_PASSES = 4
"""Forward passes of a sweep: the dense layer, the pruned one as each of two sites is measured, and once more after."""


def count_passes(sites: Sequence[Site], method: Method, memory: int, *, sequential: bool = False) -> int:
    """Count how often the calibration text runs through the model, if every site loses units.

    Args:
        sites: the model's sites.
        method: the components.
        memory: bytes of statistics at a time.
        sequential: whether corrections are found in one sweep over the layers.
    """
    repairing = method.repairing
    if not sequential and size_of(method.statistics, sites) <= memory:
        return int(bool(method.statistics))
    scoring = len(split_by_memory(sites, method.scoring, memory)) if method.scoring else 0
    if sequential:
        return scoring + SWEEP_PASSES
    return scoring + (len(split_by_memory(sites, repairing, memory)) if repairing else 0)


def peak_memory(sites: Sequence[Site], method: Method, memory: int, *, sequential: bool = False) -> int:
    """Return the bytes of the most statistics that are in memory together; see ``count_passes``."""
    if not sequential and size_of(method.statistics, sites) <= memory:
        return size_of(method.statistics, sites)
    parts = [(method.scoring, part) for part in split_by_memory(sites, method.scoring, memory)]
    if sequential:
        corrector = corrector_of(method.compensators)
        in_sequence = corrector.measures_in_sequence() if corrector else ()
        parts += [(in_sequence, [site]) for site in sites]
    else:
        parts += [(method.repairing, part) for part in split_by_memory(sites, method.repairing, memory)]
    return max(size_of(statistics, part) for statistics, part in parts)
