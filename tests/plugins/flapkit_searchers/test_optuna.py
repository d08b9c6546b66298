"""Optuna's trials: exact budgets, never worse than AL-AM on held-out windows, carried on from a storage."""

from __future__ import annotations

import pytest
from conftest import make_llama
from planted import random_scores

import flapkit
from flapkit.model.budget import Budget
from flapkit.registry import SEARCHER, Registry
from flapkit.system.errors import InputError

REGISTRY = Registry.load()


def search(objective, ratio=0.4, **options):
    sites = flapkit.sites(make_llama())
    scores = random_scores(sites)
    searcher = REGISTRY.create(SEARCHER, "optuna", options)
    budget = Budget.over(sites, ratio)
    start = REGISTRY.create(SEARCHER, "al_am").search(sites, scores, budget)

    def objectives(plans, share=1.0):
        return [objective(plan) for plan in plans]

    return sites, budget, start, searcher.search_by_trials(sites, scores, budget, objectives)


def early(plan):
    """Prefer plans that keep the first layer whole."""
    return 100.0 - len(plan.keep["layers.0.mlp"]) - len(plan.keep["layers.0.attention"])


def test_a_missing_package_says_which_extra(without):
    without("optuna")
    with pytest.raises(InputError, match=r"flapkit\[optuna\]"):
        search(early)


@pytest.mark.slow
def test_the_first_trial_is_al_am():
    seen = []
    _, _, start, found = search(lambda plan: seen.append(plan) or early(plan), trials=1)
    assert found == start
    assert seen == [start, start]


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.7])
def test_every_trial_meets_the_budget(ratio):
    seen = []
    sites, budget, start, found = search(lambda plan: seen.append(plan) or early(plan), ratio, trials=20)
    smallest = min(site.params_per_unit for site in sites)
    assert all(0 <= budget.params - plan.removed_params(sites) < smallest for plan in seen)
    assert early(found) == min(map(early, seen)) < early(start)


@pytest.mark.slow
def test_carries_on_from_a_storage(tmp_path):
    storage, seen = f"sqlite:///{tmp_path / 'trials.db'}", []

    def stopped(plan):
        seen.append(plan)
        if len(seen) > 5:
            raise KeyboardInterrupt
        return early(plan)

    with pytest.raises(KeyboardInterrupt):
        search(stopped, trials=12, storage=storage)
    after = []
    *_, found = search(lambda plan: after.append(plan) or early(plan), trials=12, storage=storage)
    assert 1 < len(after) <= 1 + 12 - 4
    assert early(found) == min(map(early, [*seen[:5], *after]))
    again = []
    *_, same = search(lambda plan: again.append(plan) or early(plan), trials=12, storage=storage)
    assert (len(again), same) == (1, found)


@pytest.mark.slow
def test_a_storage_that_cannot_be_used():
    with pytest.raises(InputError, match=r"searcher\.storage"):
        search(early, storage="sqlite:////nowhere/at/all.db")


@pytest.mark.slow
def test_prunes_a_model(tokens):
    model = make_llama()
    plan = flapkit.prune_(model, tokens, searcher=REGISTRY.create(SEARCHER, "optuna", {"trials": 4}), ratio=0.3)
    sites = flapkit.sites(make_llama())
    budget = Budget.over(sites, 0.3)
    assert 0 <= budget.params - plan.removed_params(sites) < min(site.params_per_unit for site in sites)
