"""Mistakes of a plugin's author are one error that names the component and the site."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from flapkit_searchers.al_am import ALAM

import flapkit
from flapkit.interfaces import (
    Compensator,
    ImportanceMetric,
    Moments,
    PluginError,
    PruningPlan,
    Statistic,
    StructureSearcher,
)


@dataclass(frozen=True)
class Raises(ImportanceMetric):
    name = "raises"

    def score(self, site, stats, weight):
        return weight @ torch.zeros(1, 1)


@dataclass(frozen=True)
class Undeclared(ImportanceMetric):
    name = "undeclared"

    def score(self, site, stats, weight):
        return stats[Moments].variance.view(site.units, -1)


@dataclass(frozen=True)
class ReturnsNone(Compensator):
    name = "returns_none"

    def correct(self, site, stats, weight, keep):
        return None


@dataclass(frozen=True)
class ReturnsDict(StructureSearcher):
    name = "returns_dict"

    def search(self, sites, scores, budget):
        return {site.name: list(range(site.units)) for site in sites}


@dataclass(frozen=True)
class LooksForLayers(StructureSearcher):
    name = "looks_for_layers"

    def search(self, sites, scores, budget):
        return PruningPlan({site.name: scores["layer0"] for site in sites})


@dataclass(frozen=True)
class RemovesAll(StructureSearcher):
    name = "removes_all"

    def search(self, sites, scores, budget):
        return PruningPlan({site.name: (0,) for site in sites})


@dataclass(frozen=True)
class RemovesNothing(StructureSearcher):
    name = "removes_nothing"

    def search(self, sites, scores, budget):
        return PruningPlan({site.name: tuple(range(site.units)) for site in sites})


@dataclass(frozen=True)
class GoesOverBudget(RemovesNothing):
    """Removes half as much again as it should."""

    name = "goes_over_budget"

    def search(self, sites, scores, budget):
        return ALAM().search(sites, scores, replace(budget, amount=round(1.5 * budget.amount)))


class Stateless(Statistic):
    def __init__(self, channels):
        super().__init__(channels)
        self.largest = torch.zeros(channels)

    def update(self, x):
        self.largest = torch.maximum(self.largest, x.abs().amax(0))


@dataclass(frozen=True)
class UsesStateless(ImportanceMetric):
    name = "uses_stateless"
    statistics = (Stateless,)

    def score(self, site, stats, weight):
        return stats[Stateless].largest.view(site.units, -1)


MISTAKES = {
    "searcher 'removes_all': its plan removes .* of blocks.*, but the budget is .*40.00%": {"searcher": RemovesAll()},
    "searcher 'removes_nothing': its plan removes 0 parameters": {"searcher": RemovesNothing()},
    "searcher 'goes_over_budget': its plan removes .* it may miss the budget by": {"searcher": GoesOverBudget()},
    "metric 'raises' at layers.0.attention: RuntimeError": {"metric": Raises()},
    # Although the compensator has it measured.
    "metric 'undeclared' at layers.0.attention: KeyError: .*Moments was not measured": {"metric": Undeclared()},
    r"statistic 'Stateless' has no state; .* self\.add_state\(name, tensor\)": {"metric": UsesStateless()},
    "compensator 'returns_none' at layers.*: expected a Correction, got a NoneType": {"compensator": ReturnsNone()},
    "searcher 'returns_dict': expected a PruningPlan, got a dict": {"searcher": ReturnsDict()},
    "searcher 'looks_for_layers': KeyError: 'layer0'": {"searcher": LooksForLayers()},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_names_its_component(llama, tokens, message):
    before = {name: parameter.clone() for name, parameter in llama.named_parameters()}
    with pytest.raises(PluginError, match=message):
        flapkit.prune_(llama, tokens, ratio=0.4, **MISTAKES[message])
    assert all(torch.equal(parameter, before[name]) for name, parameter in llama.named_parameters())


def test_a_statistic_needs_no_is_finite(llama, tokens):
    class Largest(Statistic):
        def __init__(self, channels):
            super().__init__(channels)
            self.add_state("largest", torch.zeros(channels))

        def update(self, x):
            self.largest = torch.maximum(self.largest, x.abs().max(0).values)

    @dataclass(frozen=True)
    class Peak(ImportanceMetric):
        name = "peak"
        statistics = (Largest,)

        def score(self, site, stats, weight):
            return stats[Largest].largest.view(site.units, -1)

    sites = flapkit.sites(llama)
    plan = flapkit.prune_(llama, tokens, metric=Peak(), ratio=0.4)
    assert plan.removed_params(sites) > 0
