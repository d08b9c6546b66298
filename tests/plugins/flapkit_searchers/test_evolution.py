"""Evolution: exact budgets, never worse than its starts, the same plan for the same seed."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_llama
from planted import random_scores

import flapkit
from flapkit.model.budget import Budget
from flapkit.pruning.algorithm import find_plan
from flapkit.registry import SEARCHER, Registry
from flapkit.system.errors import CalibrationError, InputError, RunError

REGISTRY = Registry.load()
SHORT = {"generations": 6, "children": 4, "survivors": 1}


def search(objective, ratio=0.4, **options):
    sites = flapkit.sites(make_llama())
    scores = random_scores(sites)
    searcher = REGISTRY.create(SEARCHER, "evolution", {**SHORT, **options})
    budget = Budget.over(sites, ratio)

    def objectives(plans, share=1.0):
        return [objective(plan, share) for plan in plans]

    return sites, budget, find_plan(sites, scores, searcher, budget, objectives)


def early(plan, share=1.0):
    """Prefer plans that keep the first layer whole."""
    return 1000.0 - len(plan.keep["layers.0.mlp"]) - 10 * len(plan.keep["layers.0.attention"])


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.7])
def test_every_trial_meets_the_budget(ratio):
    seen = []

    def objective(plan, share=1.0):
        seen.append(plan)
        return early(plan)

    sites, budget, found = search(objective, ratio)
    largest = max(site.params_per_unit for site in sites)
    smallest = min(site.params_per_unit for site in sites)
    short = [budget.params - plan.removed_params(sites) for plan in seen]
    assert all(0 <= left < largest for left in short)
    assert 0 <= budget.params - found.removed_params(sites) < largest
    assert min(short) < smallest
    assert early(found) == min(map(early, seen)) <= early(seen[0])


def test_it_finds_what_the_objective_wants():
    """With more generations the first layer is kept, whatever the scores say."""
    sites, _, found = search(early, 0.3, generations=60, children=8)
    assert not found.removed_units(sites[0])
    assert not found.removed_units(sites[1])


def test_the_seed_decides():
    def tried(**options):
        seen = []
        search(lambda plan, share=1.0: seen.append(plan) or early(plan), **options)
        return seen

    assert tried() == tried()
    assert tried(seed=1) != tried(seed=2)


def test_children_are_tried_on_a_part_of_the_text_first():
    shares = []
    search(lambda plan, share=1.0: shares.append(share) or early(plan), generations=3, children=4, survivors=2)
    assert shares.count(0.25) >= 3
    assert shares.count(1.0) > 3


@pytest.mark.parametrize("generations", [1, 7])
def test_no_more_text_is_run_than_it_says(generations):
    shares, options = [], {"generations": generations, "children": 4, "survivors": 2}
    search(lambda plan, share=1.0: shares.append(share) or early(plan), **options)
    searcher = REGISTRY.create(SEARCHER, "evolution", options)
    assert len(shares) <= searcher.expected_trials
    assert sum(shares) <= searcher.expected_passes


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_objective_that_is_never_finite_is_an_error(value):
    with pytest.raises(RunError, match="no plan has a finite kl"):
        search(lambda plan, share=1.0: value)


def test_a_plan_that_is_not_finite_never_wins():
    def objective(plan, share=1.0):
        return math.nan if len(plan.keep["layers.0.mlp"]) > 20 else early(plan)

    *_, found = search(objective, 0.4)
    assert math.isfinite(objective(found))


def test_a_search_on_a_model(llama, tokens):
    options = {"name": "evolution", "objective": "kl", **SHORT}
    flapkit.prune_(llama, tokens, searcher=options, compensator="least_squares", ratio=0.4)
    assert torch.isfinite(llama(tokens).logits).all()


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_a_search_ends_the_same_again(tokens, objective):
    options = {"name": "evolution", "objective": objective, **SHORT}
    one, other = (
        flapkit.prune_(make_llama(), tokens, searcher=options, compensator="least_squares", ratio=0.4) for _ in range(2)
    )
    assert one == other


def test_too_few_windows(tokens):
    llama = make_llama()
    with pytest.raises(CalibrationError, match="use at least four windows"):
        flapkit.prune_(llama, tokens[:3], searcher={"name": "evolution", **SHORT})
    with pytest.raises(CalibrationError, match="use at least five windows, or a repair that holds out none"):
        flapkit.prune_(llama, tokens[:4], searcher={"name": "evolution", **SHORT}, compensator="least_squares")


@pytest.mark.parametrize("options", [{"generations": 0}, {"steps": []}, {"steps": [0.9]}, {"objective": "loss"}])
def test_bad_options(options):
    with pytest.raises(InputError):
        REGISTRY.create(SEARCHER, "evolution", options)
