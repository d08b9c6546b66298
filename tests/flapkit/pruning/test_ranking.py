from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flapkit.model.budget import Budget, unit_costs
from flapkit.model.site import Coupling, Site
from flapkit.pruning.ranking import remove_by_layer, remove_lowest, standardise
from flapkit.system.errors import BudgetError


def site(name: str, kind: str, units: int, out_features: int) -> Site:
    return Site(name, 0, kind, f"{name}.consumer", units, 1, out_features, (Coupling(f"{name}.p", 0, 1, 3),))


SITES = (site("a", "attention", 6, 40), site("m", "mlp", 24, 5))


def test_standardise():
    values = standardise(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(values, torch.tensor([-1.0, 0.0, 1.0]))
    assert standardise(torch.full((4,), 7.0)).tolist() == [0.0] * 4


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 0.6), st.integers(1, 3), st.integers(0, 2**31))
def test_budget_and_floors(ratio, min_units, seed):
    generator = torch.Generator().manual_seed(seed)
    ranking = {s.name: torch.randint(0, 5, (s.units,), generator=generator).double() for s in SITES}
    budget = Budget.over(SITES, ratio)
    plan = remove_lowest(SITES, ranking, budget, min_units)
    assert plan == remove_lowest(SITES, ranking, budget, min_units)
    short = budget.params - plan.removed_params(SITES)
    assert 0 <= short < max(SITES[0].params_per_unit, SITES[1].params_per_unit)
    assert all(len(plan.keep[s.name]) >= min_units for s in SITES)


def test_lowest_goes_first_and_ties_go_in_order():
    ranking = {"a": torch.full((6,), 9.0), "m": torch.tensor([1.0] * 12 + [0.0] * 12)}
    plan = remove_lowest(SITES, ranking, Budget.over(SITES, 0.5), amount=14 * SITES[1].params_per_unit)
    assert plan.keep["m"] == tuple(range(2, 12))
    assert len(plan.keep["a"]) == 6


def test_floors_that_do_not_allow_the_budget():
    ranking = {s.name: torch.zeros(s.units) for s in SITES}
    with pytest.raises(BudgetError, match="the largest ratio of blocks is"):
        remove_lowest(SITES, ranking, Budget.over(SITES, 0.95), min_units=5)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 0.45), st.integers(0, 2**31))
def test_a_budget_spent_by_layer(ratio, seed):
    """Each layer loses its share and the whole plan the budget, both to within one unit; the lowest units go."""
    sites = [
        dataclasses.replace(site, name=f"{layer}.{site.name}", layer=layer) for layer in range(4) for site in SITES
    ]
    generator = torch.Generator().manual_seed(seed)
    ranking = {site.name: torch.randperm(site.units, generator=generator).double() for site in sites}
    budget, profile = Budget.over(sites, ratio), [1.0, 0.0, 2.0, 1.5]
    plan = remove_by_layer(sites, ranking, budget, profile)
    unit = max(unit_costs(sites, budget.cost))
    assert 0 <= budget.params - plan.removed_params(sites) < unit
    for layer, weight in enumerate(profile):
        members = [site for site in sites if site.layer == layer]
        assert abs(plan.removed_params(members) - weight / sum(profile) * budget.params) <= unit * (weight > 0)
        for site in members:
            removed = plan.removed_units(site)
            assert sorted(ranking[site.name][list(removed)].tolist()) == list(range(len(removed)))


def test_a_profile_that_does_not_fit():
    with pytest.raises(BudgetError, match="expected 1 ratios, one per layer"):
        remove_by_layer(SITES, {}, Budget.over(SITES, 0.2), [1.0, 2.0])
