"""A plan by hand, or a saved one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from flapkit.interfaces import Budget, BudgetError, File, InputError, PruningPlan, Site, StructureSearcher

ROUNDING = 5e-5
"""A ratio of four digits is as near as this to what a plan removes."""


@dataclass(frozen=True)
class Plan(StructureSearcher):
    """Carry out a plan from a file: a run's ``plan.json``, or one by hand. Needs no scores.

    The file is JSON, ``{"keep": {"layers.0.attention": [0, 2, 3], ...}}``: the units that a site keeps, as indices
    into the model. A site that it does not name stays whole. The recipe's budget says what the plan is meant to
    remove, and one that removes something else is refused.
    """

    name = "plan"
    uses_scores = False

    path: Annotated[File, Field(description="The plan's file; in a recipe relative to the recipe's folder.")]

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Read the plan, and check it against the model and the budget."""
        named = PruningPlan.read(self.path).keep
        plan = PruningPlan({**{site.name: tuple(range(site.units)) for site in sites}, **named})
        try:
            plan.check(sites)
        except InputError as error:
            alone = f" (budget.of: {budget.of} prunes these alone)" if budget.of in ("attention", "mlp") else ""
            raise InputError(f"{self.path}: {error}{alone}") from error
        removed = plan.removed_params(sites)
        unit = max(site.params_per_unit for site in sites)
        if abs(removed - budget.params) > max(unit, ROUNDING * budget.base):
            raise BudgetError(
                f"{self.path}: this plan removes {removed:,} parameters, and budget.ratio {budget.ratio} asks for "
                f"{budget.params:,}; to carry it out, set budget.ratio to {removed / budget.base:.4f}"
            )
        return plan
