"""Budgets: how much to remove, and of what.

There is one mechanism for all kinds: a ``Cost`` says what each unit costs in one measure (parameters, bytes, time), and
a ``Budget`` how much of that goes. A site whose units cost nothing is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, groups
from flapkit.system.errors import BudgetError, did_you_mean

BudgetBase = Literal["blocks", "model", "attention", "mlp", "mixture"]
Measure = Literal["params", "active_params", "memory", "kv_cache", "latency"]

WORDS: Mapping[Measure, str] = {
    "params": "parameters",
    "active_params": "active parameters",
    "memory": "bytes of weights",
    "kv_cache": "bytes of KV cache per token",
    "latency": "of time",
}
"""What a number counts, in each measure."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model and each of its units cost in one measure, in whole numbers, so that sums are exact.

    Args:
        measure: what is counted.
        total: cost of the dense model.
        units: site name -> cost of one unit; the units of other sites cost nothing.
        added: site name -> what the site's correction adds as soon as a unit is removed there: a bias.
        rest: site name -> what goes with its last unit, beside that unit.
        scale: all numbers are in this fraction of the measure: active parameters can be thirds.
        detail: what the cost depends on, such as a dtype.
        routed: a token goes to as many experts as before where whole ones are removed, so that their channels save
            what those of an expert that stays save.
    """

    measure: Measure
    total: int
    units: Mapping[str, int] = field(repr=False)
    added: Mapping[str, int] = field(default_factory=dict, repr=False)
    scale: int = 1
    detail: str = ""
    rest: Mapping[str, int] = field(default_factory=dict, repr=False)
    routed: bool = False

    def of(self, site: Site) -> int:
        """Return the cost of one unit of a site."""
        return self.units.get(site.name, 0)

    def of_all(self, sites: Iterable[Site]) -> int:
        """Return the cost of all units of some sites."""
        return sum(site.units * self.of(site) for site in sites)

    def added_at(self, sites: Iterable[Site]) -> int:
        """Return what the corrections of some sites add."""
        return sum(self.added.get(site.name, 0) for site in sites)

    def rest_at(self, sites: Iterable[Site]) -> int:
        """Return what goes with the last units of some sites, beside these units."""
        return sum(self.rest.get(site.name, 0) for site in sites)

    def removed(self, sites: Iterable[Site], plan: PruningPlan) -> int:
        """Return what a plan saves, less what corrections add."""
        return sum(self._removed_from(together, plan) for together in groups(list(sites)))

    def _removed_from(self, together: Sequence[Site], plan: PruningPlan) -> int:
        """Return what a plan saves at sites that keep the same number of units."""
        saved, most = 0, max(len(plan.keep[site.name]) for site in together)
        for site in together:
            kept = len(plan.keep[site.name])
            gone = bool(site.within) and not kept
            count = site.units - (most if gone and self.routed else kept)
            if count:
                # An expert that is gone needs no bias.
                saved += count * self.of(site) - (0 if gone and not self.routed else self.added_at([site]))
            if not kept:
                saved += self.rest_at([site])
        return saved

    def left(self, sites: Iterable[Site], plan: PruningPlan) -> float:
        """Return the cost of the pruned model, in the measure itself."""
        return self.shown(self.total - self.removed(sites, plan))

    def shown(self, number: int) -> float:
        """Convert a number of this cost to the measure itself."""
        return number if self.scale == 1 else number / self.scale

    def count(self, number: int) -> str:
        """Write a number of this cost."""
        return f"{number / 1e9:,.3f} ms" if self.measure == "latency" else f"{self.shown(number):,.0f}"

    def say(self, number: int) -> str:
        """Write a number of this cost with what it counts."""
        return f"{self.count(number)} {WORDS[self.measure]}"


@dataclass(frozen=True, slots=True)
class Rounding:
    """The sizes that pruned layers may have, whichever searcher chose the units.

    Args:
        multiple_of: round pruned widths (input channels of consumers) to a multiple of this.
        tensor_parallel: round them further, so that this many devices can share every layer.
        head_counts: the largest number of distinct key/value head counts over all layers; 0 for any.
    """

    multiple_of: int = 1
    tensor_parallel: int = 1
    head_counts: int = 0

    @property
    def any_size(self) -> bool:
        """Whether every size is allowed, so that nothing is rounded."""
        return self == ANY_SIZE


ANY_SIZE = Rounding()
"""Nothing is rounded."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much to remove, and of what, as an exact number.

    Args:
        cost: what counts, and what each unit costs.
        amount: how much of it to remove.
        ratio: the fraction of ``base`` that this is.
        of: what the ratio refers to: ``blocks`` (all parameters of the attentions and MLPs), ``model`` (all parameters,
            with embeddings and head), ``attention``, ``mlp`` or ``mixture`` (these alone; only they are pruned).
        base: the cost that the ratio refers to.
        asked: what the recipe asks to be left, such as ``kv_cache: 0.5``; empty for a ratio.
        left: the most that may be left, unless a ratio was asked for.
        rounding: the sizes that the pruned layers may have.
    """

    cost: Cost
    amount: int
    ratio: float
    of: BudgetBase
    base: int
    asked: str = ""
    left: int = 0
    rounding: Rounding = ANY_SIZE

    @classmethod
    def over(
        cls,
        sites: Iterable[Site],
        ratio: float,
        of: BudgetBase = "blocks",
        model_params: int = 0,
        rounding: Rounding = ANY_SIZE,
    ) -> Budget:
        """Make a budget from a ratio of parameters, counting its base over a model's sites.

        Args:
            sites: all sites of the model.
            ratio: the fraction to remove, at least 0 and below 1.
            of: what the ratio refers to.
            model_params: number of parameters of the model; needed if ``of`` is ``model``.
            rounding: the sizes that the pruned layers may have.

        Raises:
            BudgetError: the ratio is not in [0, 1), or ``of`` is unknown.
        """
        if of not in get_args(BudgetBase):
            raise BudgetError(f"budget.of: unknown base {of!r}{did_you_mean(of, get_args(BudgetBase))}")
        if not (isinstance(ratio, (int, float)) and math.isfinite(ratio) and 0 <= ratio < 1):
            raise BudgetError(
                f"budget.ratio: {ratio} is out of range; give the fraction to remove, at least 0 and below 1"
            )
        units = {site.name: site.params_per_unit for site in prunable(sites, of)}
        rest = {site.name: site.rest for site in prunable(sites, of)}
        base = model_params if of == "model" else sum(site.params for site in prunable(sites, of))
        if of == "mixture" and not base:
            raise BudgetError(
                "budget.of: mixture: the model has no mixture whose experts can be removed whole; for one of experts, "
                "set adapter: {name: auto, expert_unit: expert}"
            )
        cost = Cost("params", model_params or base, units, rest=rest)
        amount = round(ratio * base)
        return cls(cost, amount, ratio, of, base, rounding=rounding)

    @classmethod
    def leaving(
        cls,
        cost: Cost,
        sites: Sequence[Site],
        left: int,
        asked: str,
        rounding: Rounding = ANY_SIZE,
    ) -> Budget:
        """Make a budget from the most that may be left.

        What is removed is rounded so that a searcher that falls short of it by less than the cheapest unit still leaves
        no more than this: the plan leaves less by less than a unit.

        Args:
            cost: what counts.
            sites: all sites of the model.
            left: the most that the pruned model may cost.
            asked: the recipe's key and value, such as ``kv_cache: 0.5``.
            rounding: the sizes that the pruned layers may have.

        Raises:
            BudgetError: the dense model costs no more, or a model without all its units costs more.
        """
        pruned = [site for site in sites if cost.of(site)]
        need, rest = cost.total - left, cost.total - cost.of_all(pruned)
        if need <= 0:
            raise BudgetError(
                f"budget.{asked}: the dense model has only {cost.say(cost.total)} already; set a smaller budget"
            )
        if left < rest:
            raise BudgetError(
                f"budget.{asked}: the parts that cannot be pruned (embeddings, norms, head) have {cost.say(rest)} of "
                f"{cost.say(cost.total)}; set a budget above that"
            )
        steps = unit_costs(sites, cost)
        # Experts may go whole, too, so that what one of them saves counts, and not only what all do.
        experts = [
            part for site in pruned if site.within for part in (site.step * cost.of(site), cost.added_at([site]))
        ]
        grain = math.gcd(*steps, *(cost.added_at(together) for together in groups(pruned)), *experts)
        # A mixture can run out of experts, and a token then uses no less of the router: it is not the cheapest unit.
        others = unit_costs([site for site in sites if site.kind != "mixture"], cost)
        amount = -(-need // grain) * grain + min(others or steps) - grain
        return cls(cost, amount, need / cost.total, "blocks", cost.total, asked, left, rounding)

    @property
    def params(self) -> int:
        """Number of parameters that go for certain; 0 where the budget counts something else."""
        return self.amount if self.cost.measure == "params" else 0

    def prunable(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        """Return the sites whose units cost something, which alone are pruned."""
        return tuple(site for site in sites if self.cost.of(site))

    def limit(self, possible: int) -> str:
        """Write the most that can be asked for.

        Args:
            possible: the most that can be removed.
        """
        if not self.asked:
            return f"the largest ratio of {self.of} is {math.floor(1e4 * possible / self.base) / 1e4}"
        key, least = self.asked.partition(":")[0], self.cost.total - possible
        share = key in ("kv_cache", "latency")
        return f"the smallest {key} is {math.ceil(1e4 * least / self.base) / 1e4 if share else self.cost.say(least)}"

    def __repr__(self) -> str:
        """Return the amount and the rounding, without the costs of all sites."""
        rounding = "" if self.rounding.any_size else f", {self.rounding}"
        return f"Budget({str(self)!r}, of={self.of!r}{rounding})"

    def __str__(self) -> str:
        """Write what was asked for, and what it means."""
        if not self.asked:
            return f"budget.ratio: {self.ratio} means {self.cost.say(self.amount)}"
        return f"budget.{self.asked} means {self.cost.say(self.amount)} less"


def prunable(sites: Iterable[Site], of: BudgetBase) -> tuple[Site, ...]:
    """Return the sites that a budget's base allows to be pruned."""
    return tuple(
        site
        for site in sites
        if of in ("blocks", "model") or site.kind == of or (of == "mixture" and bool(site.within))
    )


def unit_costs(sites: Sequence[Site], cost: Cost) -> list[int]:
    """Return the cost of one unit of each group of sites that costs something: the least that can be removed there.

    Where several units are removed together (one of each expert, one query head of each key/value head, or a multiple
    that kernels need), they count as one. A whole expert counts with its channels.
    """
    inner = nested_costs(sites, cost)
    costs = [
        together[0].step * sum(site.runs * (cost.of(site) + inner.get(site.name, 0)) for site in together)
        for together in groups(sites)
    ]
    return [cost for cost in costs if cost]


def nested_costs(sites: Iterable[Site], cost: Cost) -> dict[str, int]:
    """Return what the channels of one expert cost, which go with it: name of the mixture -> cost."""
    return {} if cost.routed else {site.within: site.units * cost.of(site) for site in sites if site.within}
