"""Round a plan's widths to multiples that suit kernels and quantised formats."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flapkit.model.budget import Cost
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, groups
from flapkit.system.errors import BudgetError

log = logging.getLogger(__name__)

KERNELS = 32
"""Multiples of this suit vector units, matrix kernels, and the blocks of quantised formats."""


def round_plan(
    sites: Sequence[Site],
    plan: PruningPlan,
    scores: Mapping[str, Tensor],
    multiple_of: int = 1,
    tensor_parallel: int = 1,
    cost: Cost | None = None,
) -> PruningPlan:
    """Round the widths of a plan to multiples of a number, and to sizes that several devices can share.

    The width of a site is the size of its consumer's input: an MLP's channels, or an attention's heads times their
    size. A mixture that loses whole experts has no width to round. A site is rounded down or up, or stays whole. As
    few as possible are rounded up: sites are rounded down, those that lose the fewest units first, while no more is
    removed than before. Rounding up restores the units with the highest scores; rounding down
    removes those with the lowest. A site that the devices cannot share whole is rounded down, and others up
    instead. A site without units stays so.

    Args:
        sites: the sites of the plan.
        plan: the units kept.
        scores: site name -> scores [units, k]; at a site without scores, later units are removed first.
        multiple_of: the number.
        tensor_parallel: the number of devices that share every site.
        cost: what the plan's budget counts; parameters by default.

    Returns:
        The rounded plan. It removes at most as much as the plan, and less by less than the largest step.

    Raises:
        BudgetError: the devices cannot share a site, or can only if more is removed.
    """
    occupied = [together for together in groups(sites) if plan.keep[together[0].name]]
    roundings = [_Rounding.of(together, plan, multiple_of, tensor_parallel, cost) for together in occupied]
    counts = [rounding.up or rounding.down for rounding in roundings]
    left = sum(
        rounding.step_cost * (count - rounding.before) for rounding, count in zip(roundings, counts, strict=True)
    )
    while left < 0:
        # Sites that the devices cannot share whole have lost more than was asked for: others get units back.
        steps = [
            (rounding.step_cost * (larger - count), index, larger)
            for index, (rounding, count) in enumerate(zip(roundings, counts, strict=True))
            if (larger := next((size for size in rounding.sizes if size > count), 0))
        ]
        if not steps:
            least = sum(r.step_cost * (r.together[0].units_per_run - r.sizes[-1]) for r in roundings)
            amount = f"{least:,} parameters" if cost is None else cost.say(least)
            raise BudgetError(
                f"budget.tensor_parallel: {tensor_parallel} devices can share every layer only if at least {amount} "
                "are removed; raise budget.ratio (or ask for less to be left), or choose a smaller number"
            )
        restored, index, counts[index] = min(steps)
        left += restored
    order = sorted(range(len(roundings)), key=lambda index: roundings[index].before - roundings[index].down)
    for index in order:
        rounding = roundings[index]
        lost = rounding.step_cost * (counts[index] - rounding.down)
        if 0 < rounding.down < counts[index] and lost <= left:
            counts[index] = rounding.down
            left -= lost
    keep = {name: units for name, units in plan.keep.items() if not units}
    for rounding, count in zip(roundings, counts, strict=True):
        for site in rounding.together:
            keep[site.name] = _choose(site, plan.keep[site.name], scores.get(site.name), count)
    return PruningPlan({name: keep[name] for name in plan.keep})


def can_share(site: Site, units: int, devices: int) -> bool:
    """Return whether devices can share a site with a number of kept units, each taking equal parts of it.

    Query heads and channels are divided. Key/value heads are divided too, or, if they are fewer, each goes to several
    devices: the rule of vLLM's tensor parallelism.

    Args:
        site: the site.
        units: units that it keeps.
        devices: how many share it.
    """
    sizes = site.sizes(units)
    if site.kind == "mixture":
        # Devices divide the width of every expert, which stays.
        return True
    if site.kind == "mlp":
        return sizes["I"] % devices == 0
    heads, kv_heads = sizes["H"], sizes["K"]
    return heads % devices == 0 and (kv_heads % devices == 0 or devices % kv_heads == 0)


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
    """Sites that keep the same number of units in each of their runs.

    Args:
        together: the sites.
        before: the number in the plan.
        sizes: all allowed numbers, ascending.
        down: the largest allowed number up to ``before``; 0 if there is none.
        up: the smallest allowed number from ``before`` on; 0 if there is none.
        step_cost: cost of one additional unit in each run.
    """

    together: list[Site]
    before: int
    sizes: Sequence[int]
    down: int
    up: int
    step_cost: int

    @classmethod
    def of(
        cls, together: list[Site], plan: PruningPlan, multiple_of: int, devices: int, cost: Cost | None
    ) -> _Rounding:
        site = together[0]
        kept, whole = len(plan.keep[site.name]) // site.runs, site.units_per_run
        step = multiple_of // math.gcd(multiple_of, site.runs * site.channels_per_unit)
        if site.kind == "mixture":
            step = 1
        aligned = [*range(step, whole, step), whole]
        sizes = [count for count in aligned if can_share(site, count * site.runs, devices)]
        if not sizes:
            width = "width" if site.kind == "mlp" else f"heads ({site.heads} with {site.kv_heads} key/value heads)"
            rule = f" to multiples of {multiple_of}" if multiple_of > 1 else ""
            raise BudgetError(
                f"budget.tensor_parallel: {site.name}: its {width} cannot be rounded{rule} so that {devices} devices "
                "share it; choose a smaller number"
            )
        down, up = max((size for size in sizes if size <= kept), default=0), next((s for s in sizes if s >= kept), 0)
        step_cost = sum(site.runs * (cost.of(site) if cost else site.params_per_unit) for site in together)
        return cls(together, kept, sizes, down, up, step_cost)


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
