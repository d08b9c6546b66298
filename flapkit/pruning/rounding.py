"""Round a plan's widths, so that they suit kernels and quantised formats."""

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
"""Widths of this multiple suit vector units, matrix kernels, and the blocks of quantised formats."""


def round_plan(sites: Sequence[Site], plan: PruningPlan, scores: Mapping[str, Tensor], multiple_of: int) -> PruningPlan:
    """Project a plan onto widths that are a multiple of a number; any searcher's plan will do.

    What is rounded is the consumer's input: an MLP's channels, an attention's heads times their size. A site goes to
    the multiple below or above it, or stays whole. As few as possible go up: those that lose least by going down do, as
    long as no more parameters go than before. The units that are given back are those of the highest scores, and those
    that are taken of the lowest.

    Args:
        sites: the sites that the plan is for.
        plan: the units kept.
        scores: site name -> scores [units, k]; a site without any is taken in its units' order, last to first.
        multiple_of: the number.

    Returns:
        The rounded plan; the parameters that it removes are at most the plan's, and short of them by less than the
        largest step.
    """
    roundings = [_Rounding.of(together, plan, multiple_of) for together in groups(sites)]
    left = sum(each.step_cost * (each.up - each.kept) for each in roundings)
    counts = {id(each): each.up for each in roundings}
    for each in sorted(roundings, key=lambda each: each.kept - each.down):
        cost = each.step_cost * (each.up - each.down)
        if each.down < each.up and cost <= left:
            counts[id(each)] = each.down
            left -= cost
    keep: dict[str, tuple[int, ...]] = {}
    for each in roundings:
        for site in each.together:
            keep[site.name] = _kept(site, plan.keep[site.name], scores.get(site.name), counts[id(each)])
    return PruningPlan({name: keep[name] for name in plan.keep if name in keep})


def odd_widths(sites: Sequence[Site], plan: PruningPlan, multiple_of: int = KERNELS) -> list[int]:
    """List the widths of pruned MLPs that are no multiple of a number."""
    kept = {site.name: len(plan.keep[site.name]) for site in sites if site.kind == "mlp"}
    pruned = [kept[site.name] for site in sites if kept.get(site.name, site.units) < site.units]
    return [width for width in pruned if width % multiple_of]


def warn_of_odd(sites: Sequence[Site], plan: PruningPlan) -> None:
    """Warn of widths that kernels and quantised formats handle slowly."""
    if odd := odd_widths(sites, plan):
        log.warning(
            "%d pruned MLPs are of a width that is no multiple of %d (%d, ...), which kernels and quantised formats "
            "handle slowly; budget.multiple_of rounds them",
            len(odd), KERNELS, odd[0],
        )  # fmt: skip


@dataclass(frozen=True)
class _Rounding:
    """Sites that keep the same number of units in each of their runs: that number, and the ones below and above."""

    together: list[Site]
    kept: int
    down: int
    up: int

    @classmethod
    def of(cls, together: list[Site], plan: PruningPlan, multiple_of: int) -> _Rounding:
        site = together[0]
        kept, whole = len(plan.keep[site.name]) // site.runs, site.units // site.runs
        step = multiple_of // math.gcd(multiple_of, site.runs * site.channels_per_unit)
        if kept == whole or kept % step == 0:
            return cls(together, kept, kept, kept)
        down, up = kept // step * step, min(whole, -(-kept // step) * step)
        return cls(together, kept, down or up, up)

    @property
    def step_cost(self) -> int:
        """Parameters of one unit more in each run."""
        return sum(site.runs * site.params_per_unit for site in self.together)


def _kept(site: Site, keep: Sequence[int], scores: Tensor | None, count: int) -> tuple[int, ...]:
    """Choose so many units of each run: the plan's first, and among those, and beyond them, the highest scores."""
    value = torch.arange(site.units, 0, -1.0) if scores is None else scores.double().mean(dim=1)
    kept = set(keep)
    run = site.units // site.runs
    chosen: list[int] = []
    for index in range(site.runs):
        units = range(index * run, (index + 1) * run)
        chosen += sorted(units, key=lambda unit: (unit not in kept, -float(value[unit])))[:count]
    return tuple(sorted(chosen))
