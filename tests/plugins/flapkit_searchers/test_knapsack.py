"""Knapsack: no plan that meets the budget removes less score."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from flapkit.model.budget import Budget, Cost, unit_costs
from flapkit.model.site import Coupling, Site
from flapkit.pruning.algorithm import find_plan
from flapkit.registry import SEARCHER, Registry

ATTENTION = Site("a", 0, "attention", "c", 3, 4, 8, (Coupling("p", 0, 12, 8),))
MLP = Site("m", 0, "mlp", "c", 7, 1, 8, (Coupling("p", 0, 2, 8),))
SITES = (ATTENTION, MLP, replace(ATTENTION, name="b", layer=1), replace(MLP, name="n", layer=1))


def removed_score(scores, plan):
    return sum(float(scores[site.name][plan.removed_units(site)].sum()) for site in SITES)


def best_by_force(scores, cost, least, most):
    """Try how many units each site loses, the lowest first."""
    prefix = {site.name: [0.0, *scores[site.name][:, 0].sort().values.cumsum(0).tolist()] for site in SITES}
    found = []
    for counts in itertools.product(*(range(site.units) for site in SITES)):
        spent = sum(n * cost.of(s) - (n > 0) * cost.added.get(s.name, 0) for s, n in zip(SITES, counts, strict=True))
        if least <= spent <= most:
            found.append(sum(prefix[site.name][count] for site, count in zip(SITES, counts, strict=True)))
    return min(found)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_best(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {site.name: torch.rand(site.units, 1, generator=generator).double() for site in SITES}
    added = {site.name: site.out_features for site in SITES} if seed % 2 else {}
    cost = Cost("params", 2000, {site.name: site.params_per_unit for site in SITES}, added)
    budget = Budget.leaving(cost, SITES, 2000 - 350 - 20 * seed, "params: x")
    plans = {
        name: find_plan(SITES, scores, Registry.load().create(SEARCHER, name), budget)
        for name in ("knapsack", "per_parameter")
    }
    least = budget.amount - min(unit_costs(SITES, cost)) + 1
    assert least <= cost.removed(SITES, plans["knapsack"]) <= budget.amount
    best = best_by_force(scores, cost, least, budget.amount)
    # Where biases count, the best plan may be missed by what a bias is worth.
    assert best - 1e-9 <= removed_score(scores, plans["knapsack"]) <= best + (0.5 if added else 1e-9)
    assert removed_score(scores, plans["per_parameter"]) >= best - 1e-9
