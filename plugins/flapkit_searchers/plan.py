"""A plan from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from flapkit.interfaces import Budget, BudgetError, File, InputError, PruningPlan, Site, StructureSearcher, unit_costs

ROUNDING = 5e-5
"""Rounding error of a ratio with four digits."""


@dataclass(frozen=True)
class Plan(StructureSearcher):
    """Use a plan from a file: a run's ``plan.json``, or one written by hand. Needs no scores.

    The file is JSON, ``{"keep": {"layers.0.attention": [0, 2, 3], ...}}``: the kept units of each site, as
    indices into the model. Sites that are not in the file stay whole. The plan must remove what the recipe's budget
    says; otherwise it is refused.
    """

    name = "plan"
    uses_scores = False
    takes_nested = True

    path: Annotated[
        File,
        Field(
            description="The plan's file, relative to the recipe's folder; given by `--set`, to the current directory."
        ),
    ]

    def removes_blocks(self, sites: Sequence[Site]) -> bool:
        """Tell whether the file does."""
        keep = PruningPlan.read(self.path).keep
        return any(site.removable and not keep.get(site.name, (0,)) for site in sites)

    def tolerance(self, sites: Sequence[Site], budget: Budget) -> int:
        """Allow the rounding error of a ratio with four digits, or one unit."""
        return max(round(ROUNDING * budget.base), *unit_costs(sites, budget.cost))

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Read the plan, and check it against the model and the budget."""
        named = PruningPlan.read(self.path).keep
        plan = PruningPlan({**{site.name: tuple(range(site.units)) for site in sites}, **named}).emptied(sites)
        try:
            plan.check(sites)
        except InputError as error:
            alone = f" (budget.of: {budget.of} prunes these sites only)" if budget.of in ("attention", "mlp") else ""
            alone = f" (sites that budget.{budget.asked} prunes: {len(sites)})" if budget.asked else alone
            raise InputError(f"{self.path}: {error}{alone}") from error
        cost, removed = budget.cost, budget.cost.removed(sites, plan)
        if abs(removed - budget.amount) > self.tolerance(sites, budget):
            key, left = budget.asked.partition(":")[0], cost.say(cost.total - removed)
            raise BudgetError(
                f"{self.path}: the plan leaves {left}, but {budget}; to use this plan, set budget.{key} to that"
                if budget.asked
                else f"{self.path}: the plan removes {removed:,} parameters, but budget.ratio {budget.ratio} means "
                f"{budget.amount:,}; to use this plan, set budget.ratio to {removed / budget.base:.4f}"
            )
        return plan
