"""Evolution: search how many units each site loses by trying plans on the repaired model."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from flapkit.interfaces import (
    Budget,
    Count,
    Objective,
    PruningPlan,
    RunError,
    Site,
    TrialSearcher,
    groups,
    remove_lowest,
)
from flapkit_searchers.al_am import ALAM
from flapkit_searchers.options import AttentionPower, MinUnits
from flapkit_searchers.order import places

log = logging.getLogger("flapkit.searchers.evolution")

Removed = tuple[int, ...]
"""How many steps of units each group of sites loses."""

FIRST_SHARE = 0.25
"""Share of the trial windows that all children of a generation are tried on."""


@dataclass(frozen=True)
class Evolution(TrialSearcher):
    """Search how many units each site loses, by mutation, starting from the best of several simple plans.

    Within a site the units with the lowest scores are removed first. The number of removed units of a site is a
    multiple of a step, so each of its repairs is computed only once. A child removes one to three steps more at some
    sites and as many less at others; further steps of the MLPs then meet the budget. All children of a generation are
    tried on a quarter of the trial windows, and the best of them on all windows. The steps get smaller from round to
    round. The rest of the budget, less than a step, is removed at one site, so that each plan meets the budget to
    within one unit.

    After the paper Týr-the-Pruner (arXiv 2503.09657), section 3.3. The search starts from the plan of AL-AM, the same
    ratio in every layer, ratios that grow with the logarithm of the depth (SlimGPT, NeurIPS 2024), and MLPs only.
    """

    name = "evolution"

    generations: Annotated[Count, Field(ge=1, description="Generations, over all rounds.")] = 48
    children: Annotated[Count, Field(ge=1, description="Plans of a generation.")] = 8
    survivors: Annotated[
        Count, Field(ge=1, description="Children of a generation that are tried on all trial windows.")
    ] = 2
    steps: Annotated[
        tuple[Annotated[float, Field(gt=0, le=0.5)], ...],
        Field(min_length=1, description="Fraction of a site's units in one step; one fraction for each round."),
    ] = (1 / 12, 1 / 24, 1 / 48)
    objective: Annotated[
        Literal["kl", "perplexity"],
        Field(description="What to minimise on the trial windows: the KL divergence from the dense model, in nats per "
              "token, or perplexity."),
    ] = "kl"  # fmt: skip
    seed: Annotated[Count, Field(ge=0, description="Seed of the mutations.")] = 0
    min_units: MinUnits = 1
    attention_power: AttentionPower = 2.0

    @property
    def expected_trials(self) -> int:
        """How many trials there will be, at most."""
        return 5 + len(self.steps) + self.generations * (self.children + self.survivors)

    @property
    def expected_passes(self) -> float:
        """How often the trial windows run through the model, at most."""
        return 5 + len(self.steps) + self.generations * (FIRST_SHARE * self.children + self.survivors)

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Return AL-AM's plan, one of the starts."""
        return ALAM(self.min_units, self.attention_power).search(sites, scores, budget)

    def search_by_trials(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget, objective: Objective
    ) -> PruningPlan:
        """Return the best plan of all trials.

        Raises:
            BudgetError: the budget cannot be met.
            RunError: no plan that was tried has a finite objective.
        """

        def judged(plans: Sequence[PruningPlan], share: float = 1.0) -> list[float]:
            return [value if math.isfinite(value) else math.inf for value in objective(plans, share)]

        best = self.search(sites, scores, budget)
        draw = random.Random(self.seed)
        (value,) = judged([best])
        log.info("evolution: %s %.4f for AL-AM's plan", self.objective, value)
        for number, step in enumerate(self.steps):
            space = _Space.of(sites, scores, budget, step, self.min_units)
            starts = [space.nearest(best, draw), *(space.starts(draw) if number == 0 else [])]
            rounds = self.generations * (number + 1) // len(self.steps) - self.generations * number // len(self.steps)
            tried = judged([space.plan(choice) for choice in starts])
            parent, reached = min(zip(starts, tried, strict=True), key=lambda pair: pair[1])
            for _ in range(rounds):
                for child, of_child in self._generation(space, parent, judged, draw):
                    if of_child < reached:
                        parent, reached = child, of_child
            if reached < value:
                best, value = space.plan(parent), reached
            log.info("evolution: %s %.4f after the steps of %.3f", self.objective, value, step)
        if not math.isfinite(value):
            raise RunError(f"searcher evolution: no plan has a finite {self.objective}; check the calibration text")
        return best

    def _generation(
        self, space: _Space, parent: Removed, objective: Objective, draw: random.Random
    ) -> Iterator[tuple[Removed, float]]:
        """Try the children of a plan, and yield those that are tried on all windows."""
        children = sorted({space.mutated(parent, draw) for _ in range(self.children)} - {parent})
        first = dict(zip(children, objective([space.plan(child) for child in children], FIRST_SHARE), strict=True))
        best = sorted(first, key=first.__getitem__)[: self.survivors]
        yield from zip(best, objective([space.plan(child) for child in best]), strict=True)


@dataclass(frozen=True)
class _Group:
    """Sites that lose the same number of units.

    Args:
        sites: the sites.
        step: units of each run of a site that go in one step.
        steps: steps that can go.
        cost: what one step costs.
    """

    sites: Sequence[Site]
    step: int
    steps: int
    cost: int

    @classmethod
    def of(cls, sites: Sequence[Site], fraction: float, min_units: int, budget: Budget) -> _Group:
        """Divide the units of some sites into steps."""
        site = sites[0]
        length = site.units_per_run
        step = max(1, round(fraction * length / site.step)) * site.step
        floor = math.ceil(max(min_units, site.least) / site.runs)
        cost = step * sum(budget.cost.of(member) * member.runs for member in sites)
        return cls(sites, step, max(0, length - floor) // step, cost)

    @property
    def prunes_attention(self) -> bool:
        """Whether these are attentions."""
        return self.sites[0].kind == "attention"


@dataclass(frozen=True)
class _Space:
    """The plans of a round: how many steps each group of sites loses.

    Args:
        sites: the sites.
        groups: those that lose the same number of units.
        order: site name -> for each unit, its place among those of its run that go first [units], from 0 to below 1.
        budget: how much to remove.
        min_units: units that every site keeps.
    """

    sites: Sequence[Site]
    groups: Sequence[_Group]
    order: Mapping[str, Tensor]
    budget: Budget
    min_units: int

    @classmethod
    def of(
        cls, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget, fraction: float, min_units: int
    ) -> _Space:
        """Divide all sites into steps."""
        divided = [_Group.of(together, fraction, min_units, budget) for together in groups(sites)]
        order = {site.name: _order(site, scores[site.name]) for site in sites}
        return cls(sites, divided, order, budget, min_units)

    def plan(self, removed: Removed) -> PruningPlan:
        """Return the plan of a choice, which meets the budget to within one unit."""
        ranking = {}
        rest = next((i for i in _by_kind(self.groups) if removed[i] < self.groups[i].steps), -1)
        for index, (group, steps) in enumerate(zip(self.groups, removed, strict=True)):
            for site in group.sites:
                order = self.order[site.name]
                first = order < (steps * group.step - 0.5) / site.units_per_run
                # What is chosen goes first, and then what is left of the budget, at one site as far as it has units.
                ranking[site.name] = order - 10.0 * first - 5.0 * (index == rest)
        return remove_lowest(self.sites, ranking, self.budget, self.min_units)

    def nearest(self, plan: PruningPlan, draw: random.Random) -> Removed:
        """Return the choice next to a plan."""
        ratios = [len(plan.removed_units(group.sites[0])) / group.sites[0].units for group in self.groups]
        return self._rounded(ratios, draw)

    def starts(self, draw: random.Random) -> list[Removed]:
        """Return simple choices that meet the budget."""
        layers = sorted({group.sites[0].layer for group in self.groups})
        depth = {layer: math.log(1 + place) / math.log(max(2, len(layers))) for place, layer in enumerate(layers)}
        profiles: list[Callable[[_Group], float]] = [
            lambda group: 1.0,
            lambda group: 0.0 if group.prunes_attention else 1.0,
            lambda group: 0.5 if group.prunes_attention else 1.0,
            lambda group: 0.5 + depth[group.sites[0].layer],
        ]
        return [self._scaled([profile(group) for group in self.groups], draw) for profile in profiles]

    def mutated(self, removed: Removed, draw: random.Random) -> Removed:
        """Take one to three steps more at some sites, and as many less at others."""
        changed = list(removed)
        for _ in range(draw.choice((1, 1, 2, 3))):
            more, less = draw.sample(range(len(changed)), 2) if len(changed) > 1 else (0, 0)
            size = draw.choice((1, 1, 2))
            changed[more] = min(self.groups[more].steps, changed[more] + self._size(more, size))
            changed[less] = max(0, changed[less] - self._size(less, size))
        return self._met(changed, draw)

    def _size(self, index: int, size: int) -> int:
        return 1 if self.groups[index].prunes_attention else size

    def _scaled(self, weights: Sequence[float], draw: random.Random) -> Removed:
        """Return the choice whose ratios are in proportion to some weights."""
        costs = [group.cost * group.steps for group in self.groups]
        low, high = 0.0, 1e6
        for _ in range(60):
            middle = (low + high) / 2
            taken = sum(cost * min(1.0, middle * weight) for cost, weight in zip(costs, weights, strict=True))
            low, high = (middle, high) if taken < self.budget.amount else (low, middle)
        return self._rounded([min(1.0, low * weight) for weight in weights], draw)

    def _rounded(self, ratios: Sequence[float], draw: random.Random) -> Removed:
        steps = [
            min(group.steps, round(ratio * group.sites[0].units_per_run / group.step))
            for group, ratio in zip(self.groups, ratios, strict=True)
        ]
        return self._met(steps, draw)

    def _met(self, steps: list[int], draw: random.Random) -> Removed:
        """Take or give back steps, of MLPs where there are some, until less than a step of the budget is left."""
        left = self.budget.amount - sum(group.cost * count for group, count in zip(self.groups, steps, strict=True))
        while left < 0:
            index = _drawn([i for i, count in enumerate(steps) if count], self.groups, draw)
            steps[index] -= 1
            left += self.groups[index].cost
        while able := [i for i, g in enumerate(self.groups) if steps[i] < g.steps and g.cost <= left]:
            index = _drawn(able, self.groups, draw)
            steps[index] += 1
            left -= self.groups[index].cost
        return tuple(steps)


def _drawn(indices: Sequence[int], divided: Sequence[_Group], draw: random.Random) -> int:
    """Draw a group, an MLP if there is one."""
    return draw.choice([i for i in indices if not divided[i].prunes_attention] or list(indices))


def _by_kind(divided: Sequence[_Group]) -> list[int]:
    """List the groups: MLPs first, whose units are small."""
    return sorted(range(len(divided)), key=lambda index: (divided[index].prunes_attention, index))


def _order(site: Site, scores: Tensor) -> Tensor:
    """Return each unit's place among those of its run that go first [units], from 0 to below 1."""
    return places(site, scores) / site.units_per_run
