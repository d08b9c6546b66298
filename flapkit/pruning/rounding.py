"""Round a plan's widths to multiples that suit kernels and quantised formats."""

from __future__ import annotations

import heapq
import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flapkit.model.budget import Cost, Rounding
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, groups
from flapkit.system.errors import BudgetError
from flapkit.system.sizes import counted

log = logging.getLogger(__name__)

KERNELS = 32
"""Multiples of this suit vector units, matrix kernels, and the blocks of quantised formats."""


def round_plan(
    sites: Sequence[Site],
    plan: PruningPlan,
    scores: Mapping[str, Tensor],
    rounding: Rounding,
    *,
    cost: Cost | None = None,
) -> PruningPlan:
    """Round the widths of a plan to multiples of a number, to sizes that several devices can share, and to few sizes.

    The width of a site is the size of its consumer's input: an MLP's channels, or an attention's heads times their
    size. A mixture that loses whole experts has no width to round. A site is rounded down or up, or stays whole. As
    few as possible are rounded up: sites are rounded down, those that lose the fewest units first, while no more is
    removed than before. Rounding up restores the units with the highest scores; rounding down
    removes those with the lowest. A site that the devices cannot share whole, or whose number of heads is to go, is
    rounded down, and others up instead. A site without units stays so.

    Args:
        sites: the sites of the plan.
        plan: the units kept.
        scores: site name -> scores [units, k]; at a site without scores, later units are removed first.
        rounding: the sizes that the sites may have. Of the numbers of key/value heads, those are kept that change the
            fewest heads, or others if the plan's budget cannot be met with them.
        cost: what the plan's budget counts; parameters by default.

    Returns:
        The rounded plan. It removes at most as much as the plan, and less by less than the largest step.

    Raises:
        BudgetError: the devices cannot share a site, or so few numbers of heads are impossible, or either is possible
            only if more is removed.
    """
    occupied = groups([site for site in sites if plan.keep[site.name]])
    choices = [_Sizes.of(together, plan, rounding, cost) for together in occupied]
    if rounding.head_counts:
        choices = _limit_head_counts(choices, rounding.head_counts)
    counts = [sizes.up or sizes.down for sizes in choices]
    left = sum(sizes.restored(count) for sizes, count in zip(choices, counts, strict=True))
    # Sites that had to be rounded down have lost more than was asked for: others get units back, the cheapest first.
    steps = [step for index, sizes in enumerate(choices) if (step := sizes.step_up(counts[index], index))]
    heapq.heapify(steps)
    while left < 0:
        if not steps:
            least = sum(r.step_cost * (r.together[0].units_per_run - r.allowed[-1]) for r in choices)
            amount = f"{least:,} parameters" if cost is None else cost.say(least)
            rule = f"budget.tensor_parallel: {rounding.tensor_parallel} devices can share every layer"
            if rounding.head_counts:
                rule = f"budget.head_counts: {rounding.head_counts} distinct numbers of key/value heads are possible"
            raise BudgetError(
                f"{rule} only if at least {amount} are removed; raise budget.ratio (or lower another budget), or "
                f"choose a {'larger' if rounding.head_counts else 'smaller'} number"
            )
        restored, _, index, counts[index] = heapq.heappop(steps)
        left += restored
        if step := choices[index].step_up(counts[index], index):
            heapq.heappush(steps, step)
    order = sorted(range(len(choices)), key=lambda index: choices[index].before - choices[index].down)
    for index in order:
        sizes = choices[index]
        lost = sizes.step_cost * (counts[index] - sizes.down)
        if 0 < sizes.down < counts[index] and lost <= left:
            counts[index] = sizes.down
            left -= lost
    keep = {name: units for name, units in plan.keep.items() if not units}
    for sizes, count in zip(choices, counts, strict=True):
        for site in sizes.together:
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
            "the width of %s is not a multiple of %d (the first is %d), which is slow in kernels and "
            "quantised formats; budget.multiple_of rounds it",
            counted(len(widths), "pruned MLP"), KERNELS, widths[0],
        )  # fmt: skip


@dataclass(frozen=True)
class _Sizes:
    """The sizes of sites that keep the same number of units in each of their runs.

    Args:
        together: the sites.
        before: the number in the plan.
        allowed: all numbers that they may keep, ascending.
        step_cost: cost of one additional unit in each run.
    """

    together: list[Site]
    before: int
    allowed: Sequence[int]
    step_cost: int

    @classmethod
    def of(cls, together: list[Site], plan: PruningPlan, rounding: Rounding, cost: Cost | None) -> _Sizes:
        site = together[0]
        kept, whole = len(plan.keep[site.name]) // site.runs, site.units_per_run
        multiple_of, devices = rounding.multiple_of, rounding.tensor_parallel
        step = multiple_of // math.gcd(multiple_of, site.runs * site.channels_per_unit)
        if site.kind == "mixture":
            step = 1
        # Experts whose channels are gone do not come back.
        aligned = [kept] if site.nested else [*range(step, whole, step), whole]
        allowed = [count for count in aligned if can_share(site, count * site.runs, devices)]
        if not allowed:
            width = "width" if site.kind == "mlp" else f"heads ({site.heads} with {site.kv_heads} key/value heads)"
            rule = f" to multiples of {multiple_of}" if multiple_of > 1 else ""
            raise BudgetError(
                f"budget.tensor_parallel: {site.name}: its {width} cannot be rounded{rule} so that {devices} devices "
                "share it; choose a smaller number"
            )
        step_cost = sum(site.runs * (cost.of(site) if cost else site.params_per_unit) for site in together)
        return cls(together, kept, allowed, step_cost)

    @property
    def down(self) -> int:
        """The largest allowed number up to ``before``; 0 if there is none."""
        at = bisect_right(self.allowed, self.before)
        return self.allowed[at - 1] if at else 0

    @property
    def up(self) -> int:
        """The smallest allowed number from ``before`` on; 0 if there is none."""
        at = bisect_left(self.allowed, self.before)
        return self.allowed[at] if at < len(self.allowed) else 0

    @property
    def least(self) -> int:
        """The smallest number that the site can be rounded to: down, or up if that is not allowed."""
        return self.down or self.up

    @property
    def nearest(self) -> int:
        """The allowed number nearest to ``before``; of two, the smaller."""
        return min(self.allowed, key=lambda size: abs(size - self.before))

    def restored(self, count: int) -> int:
        """Return what is restored if the sites keep a number of units per run, and not ``before``."""
        return self.step_cost * (count - self.before)

    def step_up(self, count: int, index: int) -> tuple[int, int, int, int] | None:
        """Return the next larger size as an entry of a heap, or None if there is none.

        Returns:
            The cost; the units that come back in all, so that sites of equal cost take turns; the index; the size.
        """
        at = bisect_right(self.allowed, count)
        if at == len(self.allowed):
            return None
        larger = self.allowed[at]
        return self.step_cost * (larger - count), larger - self.before, index, larger

    def kv_heads(self, count: int) -> int:
        """Return the key/value heads of an attention that keeps a number of units per run."""
        site = self.together[0]
        return site.sizes(count * site.runs)["K"]

    def limited(self, numbers: Sequence[int]) -> _Sizes:
        """Allow an attention only some numbers of key/value heads; other sites stay as they are."""
        if self.together[0].kind != "attention":
            return self
        return replace(self, allowed=[size for size in self.allowed if self.kv_heads(size) in numbers])

    def changed(self) -> int | float:
        """Return the cost of the units that change at least; infinity if no size is allowed."""
        return min((abs(self.restored(size)) for size in self.allowed), default=math.inf)


def _limit_head_counts(choices: Sequence[_Sizes], number: int) -> list[_Sizes]:
    """Allow attentions only so many different numbers of key/value heads.

    Numbers go one after the other, always the one without which the fewest units change. Then the largest is raised
    until no more than the plan is removed, and the smallest lowered until no less is, if other sites make up for it.

    Raises:
        BudgetError: the attentions have no such numbers in common.
    """
    heads = [sizes for sizes in choices if sizes.together[0].kind == "attention"]
    if not heads:
        return list(choices)
    possible = sorted({sizes.kv_heads(size) for sizes in heads for size in sizes.allowed})
    numbers = sorted({sizes.kv_heads(sizes.nearest) for sizes in heads})
    while len(numbers) > number:
        without = [[other for other in numbers if other != gone] for gone in numbers]
        numbers = min(without, key=lambda some: sum(sizes.limited(some).changed() for sizes in heads))

    def restored(numbers: Sequence[int], *, most: bool) -> float:
        """Return what comes back if all sites are rounded up, or down; infinity if one of them has no size."""
        found = [sizes.limited(numbers) for sizes in choices]
        if not all(sizes.allowed for sizes in found):
            return math.inf
        return sum(sizes.restored(sizes.allowed[-1] if most else sizes.least) for sizes in found)

    for larger in possible[bisect_right(possible, numbers[-1]) :]:
        more = [*numbers[:-1], larger]
        if restored(numbers, most=True) >= 0 or restored(more, most=True) == math.inf:
            break
        numbers = more
    for smaller in reversed(possible[: bisect_left(possible, numbers[0])]):
        fewer = [smaller, *numbers[1:]]
        if restored(numbers, most=False) <= 0 or not 0 <= restored(fewer, most=True) < math.inf:
            break
        numbers = fewer
    if restored(numbers, most=True) == math.inf:
        raise BudgetError(
            f"budget.head_counts: the attentions differ in size, and cannot all keep one of {number} numbers of "
            "key/value heads; choose a larger number"
        )
    return [sizes.limited(numbers) for sizes in choices]


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
