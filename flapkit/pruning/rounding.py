"""Round a plan's widths to multiples that suit kernels and quantised formats."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, groups

log = logging.getLogger(__name__)

KERNELS = 32
"""Multiples of this suit vector units, matrix kernels, and the blocks of quantised formats."""


def round_plan(sites: Sequence[Site], plan: PruningPlan, scores: Mapping[str, Tensor], multiple_of: int) -> PruningPlan:
    """Round the widths of a plan to multiples of a number.

    The width of a site is the size of its consumer's input: an MLP's channels, or an attention's heads times their
    size. A site is rounded down or up, or stays whole. As few as possible are rounded up: sites are rounded down, those
    that lose the fewest units first, while no more parameters are removed than before. Rounding up restores the units
    with the highest scores; rounding down removes those with the lowest.

    Args:
        sites: the sites of the plan.
        plan: the units kept.
        scores: site name -> scores [units, k]; at a site without scores, later units are removed first.
        multiple_of: the number.

    Returns:
        The rounded plan. It removes at most as many parameters as the plan, and fewer by less than the largest step.
    """
    roundings = [_Rounding.of(together, plan, multiple_of) for together in groups(sites)]
    left = sum(rounding.step_cost * (rounding.up - rounding.before) for rounding in roundings)
    counts = {id(rounding): rounding.up for rounding in roundings}
    for rounding in sorted(roundings, key=lambda rounding: rounding.before - rounding.down):
        cost = rounding.step_cost * (rounding.up - rounding.down)
        if rounding.down < rounding.up and cost <= left:
            counts[id(rounding)] = rounding.down
            left -= cost
    keep: dict[str, tuple[int, ...]] = {}
    for rounding in roundings:
        for site in rounding.together:
            keep[site.name] = _choose(site, plan.keep[site.name], scores.get(site.name), counts[id(rounding)])
    return PruningPlan({name: keep[name] for name in plan.keep if name in keep})


def unaligned_widths(sites: Sequence[Site], plan: PruningPlan, multiple_of: int = KERNELS) -> list[int]:
    """List the widths of pruned MLPs that are not multiples of a number."""
    kept = {site.name: len(plan.keep[site.name]) for site in sites if site.kind == "mlp"}
    pruned = [kept[site.name] for site in sites if kept.get(site.name, site.units) < site.units]
    return [width for width in pruned if width % multiple_of]


def warn_of_unaligned_widths(sites: Sequence[Site], plan: PruningPlan) -> None:
    """Warn of widths that are slow in kernels and quantised formats."""
    if widths := unaligned_widths(sites, plan):
        log.warning(
            "the widths of %d pruned MLPs are not multiples of %d (the first is %d), which is slow in kernels and "
            "quantised formats; budget.multiple_of rounds them",
            len(widths), KERNELS, widths[0],
        )  # fmt: skip


@dataclass(frozen=True)
class _Rounding:
    """Sites that keep the same number of units in each of their runs: that number, rounded down, and rounded up."""

    together: list[Site]
    before: int
    down: int
    up: int

    @classmethod
    def of(cls, together: list[Site], plan: PruningPlan, multiple_of: int) -> _Rounding:
        site = together[0]
        kept, whole = len(plan.keep[site.name]) // site.runs, site.units_per_run
        step = multiple_of // math.gcd(multiple_of, site.runs * site.channels_per_unit)
        if kept == whole or kept % step == 0:
            return cls(together, kept, kept, kept)
        down, up = kept // step * step, min(whole, -(-kept // step) * step)
        return cls(together, kept, down or up, up)

    @property
    def step_cost(self) -> int:
        """Parameters of one additional unit in each run."""
        return sum(site.runs * site.params_per_unit for site in self.together)


def _choose(site: Site, keep: Sequence[int], scores: Tensor | None, count: int) -> tuple[int, ...]:
    """Choose ``count`` units of each run: the plan's first, then others; of either, those with the highest scores."""
    value = torch.arange(site.units, 0, -1.0) if scores is None else scores.double().mean(dim=1)
    kept = set(keep)
    run = site.units_per_run
    chosen: list[int] = []
    for index in range(site.runs):
        units = range(index * run, (index + 1) * run)
        chosen += sorted(units, key=lambda unit: (unit not in kept, -float(value[unit])))[:count]
    return tuple(sorted(chosen))
